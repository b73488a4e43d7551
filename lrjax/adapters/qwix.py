"""The factors that qwix keeps beside kernels: ``pack`` and ``unpack``."""

from .interop.qwix import pack as pack, unpack as unpack
