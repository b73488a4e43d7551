import operator
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ....lowrank import LowRank
from ..._settings import as_dtype, as_number
from ...protocol import AdapterKind
from .pair import Factors


class TokenRows(AdapterKind):
    """Chosen rows of an embedding, or of a head, trained by themselves: new tokens, say.

    ``E[t] + D[k]`` for the k-th of the tokens t, with ``D (tokens, dim)`` from zero; all
    other rows stay as they are. It is LoRA with a frozen factor of zeros and ones that
    picks the rows: those of the table of an embedding, the outputs of every other layer.

    Args:
        tokens: the indices of the rows, different ones.
        dtype: of D, by default that of each weight.

    Raises:
        ValueError: for no tokens, the same one twice or a negative one; in
            :func:`lrjax.adapt`, for one that the layer does not have.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> table = eqx.nn.Embedding(100, 8, key=jax.random.key(0))
        >>> kind, where = lrjax.adapters.TokenRows([3, 99]), lambda path, layer: True
        >>> adapters = lrjax.adapt(table, kind, where=where, key=jax.random.key(1))
        >>> [x.shape for x in jax.tree.leaves(lrjax.partition(adapters)[0])]
        [(8, 2)]

    Reference:
        ``trainable_token_indices`` and ``TrainableTokensConfig`` of the PEFT library, which
        keeps the rows themselves. With all tokens it is full fine-tuning of the table.
    """

    tokens: tuple[int, ...] = eqx.field(static=True)
    dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(self, tokens: Sequence[int], *, dtype: DTypeLike | None = None):
        self.tokens, self.dtype = tuple(map(operator.index, tokens)), dtype
        if not self.tokens or min(self.tokens) < 0:
            raise ValueError(
                "TokenRows takes the indices of rows, none of them negative, got "
                f"{tokens!r}."
            )
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"TokenRows takes each row once, got {tokens!r}.")

    def init(self, site, *, key=None, pool=None, data=None):
        """Zeros beside the rows of an identity."""
        dtype, (m, n) = as_dtype(self.dtype, site), site.shape
        of_table = site.kind == "lookup"
        count = n if of_table else m
        if max(self.tokens) >= count:
            raise ValueError(
                f"TokenRows has the row {max(self.tokens)}, and {site.path or 'the root'} "
                f"has {count} rows."
            )
        picked = jax.nn.one_hot(jnp.array(self.tokens), count, axis=0, dtype=dtype)
        zeros = jnp.zeros((m if of_table else n, len(self.tokens)), dtype)
        pair = LowRank(zeros, picked) if of_table else LowRank(picked, zeros)
        one = as_number(1.0, dtype)
        return Factors(pair, None, one, None, "left" if of_table else "right")
