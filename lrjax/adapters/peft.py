"""PEFT's files: :func:`save_peft` and :func:`load_peft`."""

from .interop import load_peft as load_peft, save_peft as save_peft
