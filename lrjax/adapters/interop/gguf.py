import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ..._extras import load
from ..._sites import Levels, QuantizedArray


_ROTARY = ("adjacent", "halves")

# Of each kept type: what its codes stand for, and whether blocks have an offset.
_BLOCKS: dict[str, tuple[Levels, bool]] = {
    "Q8_0": (range(-128, 128), False),
    "Q4_0": (range(-8, 8), False),
    "Q4_1": (range(16), True),
}


class GGUF(Mapping):
    """The weights of a GGUF file by name; each is read from the disk when it is asked for.

    Attributes:
        metadata: all fields of the file, as numbers, strings and lists.
    """

    metadata: dict[str, Any]

    def __init__(self, reader: Any, dequantize: Callable, dtype: DTypeLike, rotary: str):
        self.metadata = {name: f.contents() for name, f in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize, self._dtype = dequantize, jnp.dtype(dtype)
        self._rotary = rotary

    def __getitem__(self, name: str) -> Array | QuantizedArray:
        if name not in self._tensors:
            raise KeyError(f"No tensor {name!r} in the file; there are {sorted(self)}.")
        weight = self._read(self._tensors[name])
        if self._rotary == "adjacent":
            return weight
        heads = self._permuted_heads(name)
        return weight if heads is None else _in_halves(weight, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _read(self, tensor: Any) -> Array | QuantizedArray:
        kind = tensor.tensor_type.name
        if kind in _BLOCKS:
            return _quantized(tensor.data, *_BLOCKS[kind], self._dtype)
        shape = tuple(reversed(tensor.shape.tolist()))
        dense = self._dequantize(tensor.data, tensor.tensor_type)
        return jnp.asarray(dense.reshape(shape), self._dtype)

    def _permuted_heads(self, name: str) -> int | None:
        """The number of heads of a query or key projection."""
        part = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if part not in ("attn_q", "attn_k"):
            return None
        heads = self.metadata["llama.attention.head_count"]
        if part == "attn_q":
            return heads
        return self.metadata.get("llama.attention.head_count_kv", heads)


def _quantized(
    data: np.ndarray, levels: Levels, has_offset: bool, dtype: DTypeLike
) -> QuantizedArray:
    """Blocks of 32 numbers, as they lie one after the other: scale, offset, codes."""
    width = 32 * (1 if len(levels) > 16 else 0.5) + (4 if has_offset else 2)
    blocks = np.asarray(data).reshape(*data.shape[:-1], -1, int(width))
    half = lambda at: jnp.asarray(blocks[..., at : at + 2].copy().view(np.float16)[..., 0])
    scale, offset = half(0), half(2) if has_offset else None
    codes = blocks[..., 4 if has_offset else 2 :]
    if len(levels) > 16:  # signed bytes: codes count from the lowest
        codes = codes ^ np.uint8(128)
    columns = 32 * blocks.shape[-2]
    return QuantizedArray(jnp.asarray(codes), scale, offset, levels, columns, dtype)


def _in_halves(weight: Array | QuantizedArray, heads: int) -> Array | QuantizedArray:
    """Rows (head, pair, 2) as (head, 2, pair)."""
    rows = np.arange(weight.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return jax.tree.map(lambda x: x[rows], weight)


def read_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    rotary: str = "adjacent",
) -> GGUF:
    """The weights of a model in a GGUF file, four and eight bits left as they are.

    Matrices are ``(out, in)``, as in Equinox. Blocks of types Q8_0, Q4_0 and Q4_1 become
    :class:`QuantizedArray` weights with the scales and codes of the file, at 8.5, 4.5 and
    5 bits a number; all other types become dense arrays. The file is mapped into memory: a
    weight is read when it is asked for.

    Args:
        path: of the file.
        dtype: of dense weights, and of what quantized ones give.
        rotary: which numbers of a head the rotary embedding has to turn together. GGUF
            files of the llama architecture have the rows of queries and keys in another
            order than the models they were made from: neighbors are turned together,
            ``"adjacent"``. With ``"halves"`` the rows are put back: number ``i`` of the
            first half of a head and number ``i`` of the second one.

    Returns:
        A mapping from names such as ``"blk.0.attn_q.weight"`` to arrays, with
        ``metadata``, a dict of the fields (sizes of the model, the tokenizer).

    Raises:
        ImportError: without the package ``gguf``, which ``lrjax[peft]`` brings.
        ValueError: if the file is no GGUF file, ``rotary`` is unknown, or ``"halves"`` is
            asked for in a file of another architecture than llama.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> def layer(weights, name):
        ...     weight = weights[name]
        ...     out, size = weight.shape
        ...     dense = eqx.nn.Linear(size, out, use_bias=False, key=jax.random.key(0))
        ...     return eqx.tree_at(lambda layer: layer.weight, dense, weight)
        >>> def query(path):
        ...     return layer(lrjax.adapters.read_gguf(path), "blk.0.attn_q.weight")
    """
    if rotary not in _ROTARY:
        raise ValueError(f"rotary must be one of {_ROTARY}, got {rotary!r}.")
    package = load("gguf", "peft", "Reading GGUF files")
    found = GGUF(package.GGUFReader(path), package.dequantize, dtype, rotary)
    architecture = found.metadata.get("general.architecture")
    if rotary == "halves" and architecture != "llama":
        raise ValueError(
            f"rotary='halves' undoes the order of rows of the llama architecture; {path} "
            f"is of architecture {architecture!r}: read it with rotary='adjacent'."
        )
    return found
