import equinox as eqx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ..._arguments import check_key
from ..._dense import frozen_dense
from ..._sites import LinearSite, register_layer
from ._weights import (
    Form,
    Node,
    apply,
    check_form,
    check_input,
    check_layer_rank,
    check_node,
    dense_linear,
    made_of,
    pair_of,
    spectral,
)


class LowRankLinear(eqx.Module):
    """A linear layer ``y = W x + b`` whose ``W (out, in)`` is a product of thin factors.

    ``left (rightᵀ x)``: ``2 r (in + out)`` flops in place of ``2 in · out``, and no dense
    matrix. It is called as ``eqx.nn.Linear`` is, and may be stacked, scanned and vmapped
    as one. The weight is a node, so every transform for factors finds it.

    The start is that of ``eqx.nn.Linear(in_features, out_features, key=key)``, truncated:
    its leading singular vectors, each factor with the roots of the values (spectral
    initialization). At full rank it is that layer. It takes one decomposition of a dense
    matrix; :meth:`from_node` takes any other start.

    Args:
        in_features: the size of the input.
        out_features: the size of the output.
        rank: the width of the factors, at most the smaller of the two.
        use_bias: whether there is a bias.
        form: ``"pair"`` for a :class:`~lrjax.LowRank`; ``"svd"`` for a
            :class:`~lrjax.SVDForm`, with a core between orthonormal factors.
        dtype: of weight and bias.
        key: for the start.

    Attributes:
        weight: the node, ``(out, in)``.
        bias: ``(out,)``, or ``None``.

    Raises:
        TypeError: for a rank that is no integer.
        ValueError: for a rank that the matrix cannot have, or an unknown form.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> layer = lrjax.nn.LowRankLinear(64, 32, 4, key=jax.random.key(0))
        >>> layer(jnp.ones(64)).shape, layer.weight.left.shape, layer.weight.right.shape
        ((32,), (32, 4), (64, 4))

    Reference:
        M. Khodak, N. Tenenholtz, L. Mackey, N. Fusi, "Initialization and regularization of
        factorized neural layers" (2021), arXiv 2105.01029.
    """

    weight: Node
    bias: Float[Array, "*b out"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        use_bias: bool = True,
        form: Form = "pair",
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_key("LowRankLinear", key)
        check_form(form)
        check_layer_rank("LowRankLinear", rank, (out_features, in_features))
        start = eqx.nn.Linear(in_features, out_features, use_bias, dtype, key=key)
        self.weight, self.bias = spectral(start.weight, rank, form), start.bias

    @classmethod
    def from_node(cls, weight: Node, bias: Array | None = None) -> "LowRankLinear":
        """The layer of a weight that is in factors already.

        Args:
            weight: ``(*b, out, in)``.
            bias: ``(*b, out)``, or ``None`` for none.

        Returns:
            The layer.

        Raises:
            TypeError: for a weight that is no node.
            ValueError: for a bias of another size.
        """
        check_node(cls.__name__, weight)
        if bias is not None and bias.shape != weight.shape[:-1]:
            raise ValueError(
                f"{cls.__name__} needs a bias of shape {weight.shape[:-1]} beside a weight "
                f"of shape {weight.shape}, got {bias.shape}."
            )
        return made_of(cls, weight=weight, bias=bias)

    @property
    def in_features(self) -> int:
        """The size of the input."""
        return self.weight.shape[-1]

    @property
    def out_features(self) -> int:
        """The size of the output."""
        return self.weight.shape[-2]

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    def __call__(
        self, x: Array, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " out"]:
        """``W x + b`` for one vector.

        Args:
            x: ``(in,)``.
            key: not used, as in ``eqx.nn.Linear``.

        Returns:
            ``(out,)``.

        Raises:
            ValueError: for an input of another shape.
        """
        del key
        check_input(self, x, (self.in_features,))
        y = apply(self.weight, x)
        return y if self.bias is None else y + self.bias

    def to_dense(self) -> eqx.nn.Linear:
        """The same layer with its weight multiplied out."""
        return dense_linear(self.weight.materialize(), self.bias)


@register_layer(LowRankLinear)
class LowRankLinearSite(LinearSite):
    """The site of a layer in factors, adapted as it is and merged into a dense one."""

    def matrix(self):
        """The weight, multiplied out."""
        return self.layer.weight.materialize()

    def put(self, matrix, bias):
        """An ``eqx.nn.Linear``: with a change in it the weight has another rank."""
        old, dtype = self.layer.bias, self.layer.weight.dtype
        bias = bias if bias is None or old is None else bias.astype(old.dtype)
        return dense_linear(matrix.astype(dtype), bias)

    def base(self, x):
        """``left (rightᵀ x)``; the factors get no gradient."""
        pair = pair_of(self.layer.weight)
        return frozen_dense(frozen_dense(x, pair.right.mT), pair.left)
