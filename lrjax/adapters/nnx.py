"""Flax NNX: :func:`pack` into ``nnx.LoRA``, :func:`unpack`, and the rule :func:`pairs`."""

from .interop.nnx import pack as pack, pairs as pairs, unpack as unpack
