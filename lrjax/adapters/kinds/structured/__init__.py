"""Kinds of other products: of blocks, entrywise, Kronecker's, rotations, tensors."""

from .block import (
    BAT as BAT,
    Affine as Affine,
    Block as Block,
    GraLoRA as GraLoRA,
    MiSS as MiSS,
    Repeated as Repeated,
)
from .hadamard import IA3 as IA3, Hadamard as Hadamard, HiRA as HiRA, LoHa as LoHa
from .kronecker import Kronecker as Kronecker, LoKr as LoKr, split as split
from .rotation import OFT as OFT, SODA as SODA, Rotation as Rotation
from .scaled_products import FLoRA as FLoRA, ScaledProducts as ScaledProducts
from .tensor import DoTA as DoTA, Tensor as Tensor, Tucker as Tucker
