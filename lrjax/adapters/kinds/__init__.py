"""The kinds of adapters, a file for each mechanism."""

from .bases import Bases as Bases, RandLoRA as RandLoRA
from .biased import Biased as Biased, WithBias as WithBias
from .block import BAT as BAT, Block as Block, GraLoRA as GraLoRA, MiSS as MiSS
from .core import (
    PMSS as PMSS,
    Combination as Combination,
    Core as Core,
    EigenLoRAx as EigenLoRAx,
    LoLDU as LoLDU,
    LoRASB as LoRASB,
    LoRAXS as LoRAXS,
    LoTR as LoTR,
    NoRA as NoRA,
    PoLAR as PoLAR,
    StelLA as StelLA,
    SVFit as SVFit,
    TinyLoRA as TinyLoRA,
)
from .full import Full as Full, FullCopy as FullCopy
from .fused import Fused as Fused, FusedRows as FusedRows
from .gated import AdaLoRA as AdaLoRA, IncreLoRA as IncreLoRA, SoRA as SoRA
from .hadamard import IA3 as IA3, Hadamard as Hadamard, HiRA as HiRA, LoHa as LoHa
from .kronecker import Kronecker as Kronecker, LoKr as LoKr
from .magnitude import (
    BoRA as BoRA,
    DoRA as DoRA,
    Magnitude as Magnitude,
    WithMagnitude as WithMagnitude,
)
from .masked import NLS as NLS, CapaBoost as CapaBoost, DyLoRA as DyLoRA
from .pair import Factors as Factors, LoRA as LoRA
from .rotation import OFT as OFT, SODA as SODA, Rotation as Rotation
from .scaled import Scaled as Scaled, TiedLoRA as TiedLoRA, VeRA as VeRA
from .scaled_products import FLoRA as FLoRA, ScaledProducts as ScaledProducts
from .seeded import NOLA as NOLA, Seeded as Seeded
from .tensor import DoTA as DoTA, Tensor as Tensor, Tucker as Tucker
from .tokens import TokenRows as TokenRows
from .weighted import Summed as Summed, Weighted as Weighted
