"""Directories of PEFT: its tensors, its config, and what it trains beside adapters."""

from .load import load_peft as load_peft
from .save import save_peft as save_peft
