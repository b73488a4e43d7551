import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._arguments import check_key
from ..._dense import dense
from ...linalg import nonzero, orthonormalize, working_dtype


class GrassmannHead(eqx.Module):
    """A classifier whose classes are subspaces: how much of a feature lies in each.

    The logit of class ``c`` with the orthonormal basis ``S_c (n, k)`` is::

        scale · ‖S_cᵀ x‖ / ‖x‖

    between 0 and ``scale``, for the cross-entropy of a softmax. A class so has ``k``
    directions for what varies within it. Train it by :func:`lrjax.grassmann_sgd`, which
    keeps the bases orthonormal. Stacked, scanned and vmapped as other layers are.

    Args:
        in_features: ``n``, the size of the input.
        num_classes: how many.
        dimension: ``k``, of each subspace, at most ``n``.
        scale: the logit of a feature within a subspace; no parameter.
        dtype: of the bases.
        key: for the start, subspaces drawn uniformly.

    Attributes:
        subspaces: the bases, ``(classes, n, k)``.
        scale: as given.

    Raises:
        ValueError: for sizes below one, or a dimension above ``n``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> head = lrjax.nn.GrassmannHead(64, 10, 4, key=jax.random.key(0))
        >>> head(jnp.ones(64)).shape
        (10,)
        >>> inside = head.subspaces[3, :, 0]
        >>> print(head(7 * inside)[3].round(3))
        25.0

    Reference:
        H. Wang, Z. Li, W. Zhang, "Get the best of both worlds: improving accuracy and
        transferability by Grassmann class representation" (2023), arXiv 2308.01547.
        Special case: with ``dimension=1`` the logit is ``scale · |cos|`` of the angle to a
        vector of the class.
    """

    subspaces: Float[Array, "*b classes n k"]
    scale: ArrayLike

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        dimension: int,
        *,
        scale: ArrayLike = 25.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_key("GrassmannHead", key)
        if num_classes < 1 or not 1 <= dimension <= in_features:
            raise ValueError(
                "GrassmannHead needs at least one class and a dimension between 1 and "
                f"in_features; got in_features={in_features}, num_classes={num_classes}, "
                f"dimension={dimension}."
            )
        shape = (num_classes, in_features, dimension)
        bases = orthonormalize(jr.normal(key, shape))
        self.subspaces = bases if dtype is None else bases.astype(dtype)
        self.scale = scale

    def __call__(
        self, x: Array, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " classes"]:
        """The logits of one feature, in float32 or wider.

        Args:
            x: ``(n,)``.
            key: not used, as in ``eqx.nn.Linear``.

        Returns:
            ``(classes,)``; of a zero feature all are zero.

        Raises:
            ValueError: for an input of another shape, and for a stack of heads.
        """
        del key
        if self.subspaces.ndim != 3 or x.shape != self.subspaces.shape[1:2]:
            raise ValueError(
                "GrassmannHead takes one feature of the length of its bases (classes, n, "
                f"k) = {self.subspaces.shape}, got {x.shape}: for a batch call "
                "jax.vmap(head)(x), for a stack of heads jax.vmap over both."
            )
        classes, n, k = self.subspaces.shape
        # The rows of one matrix: XLA flattens the gradient of no product of three axes.
        rows = self.subspaces.mT.reshape(classes * k, n)
        inside = dense(x, rows).reshape(classes, k)
        return jnp.asarray(self.scale) * (_length(inside) / nonzero(_length(x)))


def _length(x: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """The norm in float32 or wider; at zero it has the gradient zero."""
    squares = jnp.sum(x.astype(working_dtype(x.dtype)) ** 2, axis=-1)
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
