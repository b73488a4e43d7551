from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..protocol import Adapter, AdapterKind, Copied


class FullCopy(Adapter):
    """A weight of its own, and a bias where the layer has one.

    Attributes:
        matrix: ``(*b, out, in)``, trained.
        bias: in the layer's shape, trained.
    """

    matrix: Float[Array, "*b out in"]
    bias: Array | None

    @property
    def shape(self):
        """That of the weight."""
        return self.matrix.shape

    def trainable(self):
        """All of it."""
        return jax.tree.map(lambda _: True, self)

    def prepare(self, site, pool=None):
        """Nothing to prepare."""
        return Copied(self.matrix, self.bias)


class Full(AdapterKind):
    """A trained copy of a weight and its bias: for heads, norms and biases beside adapters.

    ``W' `` starts as ``W`` and is trained itself, ``out · in`` numbers (and the bias). The
    one kind that takes vectors as well, so that the biases and the scales of norms of a
    model can be trained outside of it.

    Args:
        dtype: of the copy, by default that of each weight.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> last = lambda path, site: lrjax.adapters.Full() if path == "layers.2" else (
        ...     lrjax.LoRA(rank=2) if site.kind == "linear" else None)
        >>> adapters = lrjax.adapt(model, last, key=jax.random.key(1))
        >>> adapters["layers.2"].bias.shape, adapters["layers.0"].pair.rank
        ((3,), 2)
    """

    takes_vectors: ClassVar[bool] = True
    dtype: DTypeLike | None = eqx.field(static=True, default=None)

    def init(self, site, *, key=None, pool=None, data=None):
        """The weight and the bias as they are."""
        as_given = lambda x: x if self.dtype is None else x.astype(self.dtype)
        weight = site.read().astype(site.dtype)
        bias = site.read_bias()
        return FullCopy(
            as_given(weight), None if bias is None else as_given(jnp.asarray(bias))
        )
