"""The factors that qwix keeps beside kernels: :func:`pack` and :func:`unpack`."""

from .interop.qwix import pack as pack, unpack as unpack
