from typing import Any

import equinox as eqx
from jaxtyping import Array

from .layers import LowRankConv, LowRankEmbedding, LowRankLinear, Node, Scheme


_OWN: Any = object()


def replace_weight(
    layer: Any, weight: Node, bias: Array | None = _OWN, *, scheme: Scheme = "inputs"
) -> LowRankLinear | LowRankConv | LowRankEmbedding:
    """The layer whose weight is a product of factors, in the place of a dense one.

    Args:
        layer: an ``eqx.nn.Linear``, ``Conv`` or ``Embedding``, or a stack of them.
        weight: the node, as ``from_node`` of the class takes it: of a convolution that of
            the folded kernel, of an embedding that of the table ``(vocabulary, size)``.
        bias: in place of that of the layer.
        scheme: how the kernel of a convolution was folded.

    Returns:
        A layer of ``lrjax.nn`` that is called as ``layer`` is.

    Raises:
        TypeError: for a layer of another class, or a weight that is no node.
        ValueError: for a weight of another shape.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> layer = eqx.nn.Linear(8, 4, key=jax.random.key(0))
        >>> thin = lrjax.nn.replace_weight(layer, lrjax.truncate(layer.weight, 2))
        >>> thin(jax.numpy.ones(8)).shape, thin.weight.rank
        ((4,), 2)
    """
    bias = getattr(layer, "bias", None) if bias is _OWN else bias
    if isinstance(layer, eqx.nn.Conv):
        return LowRankConv.from_node(weight, bias, like=layer, scheme=scheme)
    if isinstance(layer, eqx.nn.Embedding):
        return LowRankEmbedding.from_node(weight, bias)
    if isinstance(layer, eqx.nn.Linear):
        return LowRankLinear.from_node(weight, bias)
    raise TypeError(
        "replace_weight takes an eqx.nn.Linear, Conv or Embedding, got "
        f"{type(layer).__name__}."
    )
