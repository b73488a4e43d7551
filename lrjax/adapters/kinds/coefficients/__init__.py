"""Kinds that train a few numbers of matrices that are shared, or drawn at random."""

from .bases import Bases as Bases, RandLoRA as RandLoRA
from .scaled import Scaled as Scaled, TiedLoRA as TiedLoRA, VeRA as VeRA
from .seeded import NOLA as NOLA, Seeded as Seeded
