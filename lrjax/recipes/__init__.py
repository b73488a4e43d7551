"""Named optimizers: each is one short chain of transforms, named as in its paper."""

from .opsa import opsa as opsa
from .scaled_gd import scaled_gd as scaled_gd
from .scaled_subgradient import scaled_subgradient as scaled_subgradient
