from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..._arguments import check_key
from ..._dense import dense, frozen_dense
from ..._sites import LookupSite, register_layer
from ...lowrank import SVDForm
from ._weights import (
    Form,
    Node,
    check_form,
    check_layer_rank,
    check_node,
    check_stack,
    made_of,
    pair_of,
    spectral,
)


class LowRankEmbedding(eqx.Module):
    """A table ``(vocabulary, size)`` whose rows are ``right left[x]``, in thin factors.

    Only ``rank`` numbers are stored for each entry. It is called as ``eqx.nn.Embedding``
    is. The start is that of ``eqx.nn.Embedding``, truncated; the rows of a normal table
    have no leading directions to speak of, so that much of their length is cut: the
    singular values are what is left of them.

    Args:
        num_embeddings: entries of the table.
        embedding_size: the size of a row.
        rank: the width of the factors.
        form: ``"pair"`` or ``"svd"``, as of :class:`~lrjax.nn.LowRankLinear`.
        dtype: of the weight.
        key: for the start.

    Attributes:
        weight: the node, ``(vocabulary, size)``.
        bias: ``(size,)``, added to every row, or ``None``: what rows of a mean of their own
            have in common needs no column of the factors then.

    Raises:
        TypeError: for a rank that is no integer.
        ValueError: for a rank that the table cannot have, or an unknown form.

    Example:
        >>> import jax, lrjax
        >>> layer = lrjax.nn.LowRankEmbedding(100, 16, 4, key=jax.random.key(0))
        >>> layer(7).shape, jax.vmap(layer)(jax.numpy.arange(5)).shape
        ((16,), (5, 16))

    Reference:
        Z. Lan et al., "ALBERT: a lite BERT for self-supervised learning of language
        representations" (2019), arXiv 1909.11942.
    """

    weight: Node
    bias: Float[Array, "*b size"] | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_size: int,
        rank: int,
        *,
        form: Form = "pair",
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_key("LowRankEmbedding", key)
        check_form(form)
        check_layer_rank("LowRankEmbedding", rank, (num_embeddings, embedding_size))
        start = eqx.nn.Embedding(num_embeddings, embedding_size, dtype=dtype, key=key)
        self.weight, self.bias = spectral(start.weight, rank, form), None

    @classmethod
    def from_node(cls, weight: Node, bias: Array | None = None) -> "LowRankEmbedding":
        """The layer of a table that is in factors already.

        Args:
            weight: ``(*b, vocabulary, size)``.
            bias: ``(*b, size)``, or ``None`` for none.

        Returns:
            The layer.

        Raises:
            TypeError: for a weight that is no node.
            ValueError: for a bias of another size.
        """
        check_node(cls.__name__, weight)
        size = (*weight.shape[:-2], weight.shape[-1])
        if bias is not None and bias.shape != size:
            raise ValueError(
                f"{cls.__name__} needs a bias of shape {size} beside a table of shape "
                f"{weight.shape}, got {bias.shape}."
            )
        return made_of(cls, weight=weight, bias=bias)

    @property
    def num_embeddings(self) -> int:
        """Entries of the table."""
        return self.weight.shape[-2]

    @property
    def embedding_size(self) -> int:
        """The size of a row."""
        return self.weight.shape[-1]

    def __call__(self, x: Any, *, key: PRNGKeyArray | None = None) -> Float[Array, " size"]:
        """One row of the table.

        Args:
            x: its index.
            key: not used, as in ``eqx.nn.Embedding``.

        Returns:
            ``(size,)``.

        Raises:
            ValueError: for more than one index, or one that is no integer.
        """
        del key
        check_stack(self)
        if jnp.shape(x) or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise ValueError(
                f"LowRankEmbedding takes one integer, got {jnp.result_type(x)} of shape "
                f"{jnp.shape(x)}: for several call jax.vmap(layer)(x)."
            )
        h = self.weight.left[x]
        if isinstance(self.weight, SVDForm):
            h = dense(h, self.weight.masked_core().mT)
        y = dense(h, self.weight.right)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> eqx.nn.Embedding:
        """The same layer with its table multiplied out."""
        table = self.weight.materialize()
        table = table if self.bias is None else table + self.bias[..., None, :]
        return made_of(
            eqx.nn.Embedding,
            num_embeddings=self.num_embeddings,
            embedding_size=self.embedding_size,
            weight=table,
        )


@register_layer(LowRankEmbedding)
class LowRankEmbeddingSite(LookupSite):
    """The site of a table in factors, adapted as it is and merged into a dense one."""

    @property
    def acts(self) -> bool:
        """It is the product with its weight."""
        return True

    def check(self):
        """Nothing to refuse."""

    def matrix(self):
        """The table, multiplied out and transposed."""
        return self.layer.weight.materialize().mT

    def put(self, matrix, bias):
        """An ``eqx.nn.Embedding``, its rows with the bias."""
        table = matrix.mT if bias is None else matrix.mT + bias[..., None, :]
        weight = table.astype(self.layer.weight.dtype)
        return eqx.nn.Embedding(weight=weight)

    def matrix_axes(self):
        """None: the table is not there."""
        return

    def base(self, x):
        """``right left[x]``; the factors get no gradient."""
        pair = pair_of(self.layer.weight)
        return frozen_dense(lax.stop_gradient(pair.left[x]), pair.right)
