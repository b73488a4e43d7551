"""Flax NNX: ``pack`` into ``nnx.LoRA``, ``unpack``, and the rule ``pairs``."""

from .interop.nnx import pack as pack, pairs as pairs, unpack as unpack
