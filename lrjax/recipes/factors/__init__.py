"""Optimizers of LowRank nodes: the gradient preconditioned by the Gram of the partner."""

from .levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from .lora_muon import lora_muon as lora_muon
from .loro import loro as loro
from .opsa import opsa as opsa
from .prec_gd import prec_gd as prec_gd
from .scaled_gd import scaled_gd as scaled_gd
from .scaled_subgradient import scaled_subgradient as scaled_subgradient
from .subgm import subgm as subgm
