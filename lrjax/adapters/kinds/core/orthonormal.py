import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

from ....linalg import orthonormalize
from ....lowrank import LowRank
from .adapter import CoreKind


class StelLA(CoreKind):
    """StelLA: three factors of which two have orthonormal columns, ``W' = W + s · X S Yᵀ``.

    ``X (out, r)`` and ``Y (in, r)`` start as random orthonormal columns and ``S (r, r)`` as
    ``core`` times the identity; all three are trained, ``r (out + in + r)`` numbers a
    matrix, ``s = alpha / rank``. So directions and sizes are apart, and the columns can
    not collapse onto few directions, if the optimizer keeps X and Y orthonormal::

        optax.chain(
            lrjax.landing_field(0.0),   # G ← G − X Gᵀ X
            optax.adam(learning_rate),
            lrjax.keep_orthonormal(),   # back to the nearest orthonormal columns
        )

    Both act on the pairs and leave the cores alone.

    Args:
        rank: the width of the factors.
        alpha: the numerator of the scale, ``rank`` by default.
        core: what the diagonal of S starts with. One, as in the paper, is no zero change;
            0 is the model itself.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1); in :func:`lrjax.adapt`,
            for a rank above the smaller side of a matrix.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> stella = lrjax.adapters.StelLA(rank=2)
        >>> adapters = lrjax.adapt(model, stella, key=jax.random.key(1))
        >>> print(lrjax.norm(adapters[""].factors()[0]).round(4) ** 2)
        2.0

    Reference:
        Z. Li et al., "StelLA: subspace learning in low-rank adaptation using Stiefel
        manifold" (2025), arXiv:2510.01938.
    """

    core: ArrayLike

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        core: ArrayLike = 1.0,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, alpha, dropout, dtype)
        self.core = core

    def init(self, site, *, key, pool=None, data=None):
        """Random orthonormal columns."""
        if self.rank > min(site.shape):
            raise ValueError(
                f"{type(self).__name__} needs {self.rank} orthonormal columns on both sides"
                f" of {site.path or 'the root'} {site.shape}: that is too many."
            )
        dtype = self.dtype_of(site)
        left, right = (
            orthonormalize(jr.normal(k, (size, self.rank), dtype))
            for k, size in zip(jr.split(key), site.shape, strict=True)
        )
        core = jnp.asarray(self.core, dtype) * jnp.eye(self.rank, dtype=dtype)
        return self.adapter(LowRank(left, right), core, train="all")


class PoLAR(StelLA):
    """PoLAR: a polar form of low-rank adapters, ``W' = W + s · X S Yᵀ`` from a zero core.

    As :class:`lrjax.adapters.StelLA` with ``S`` from zero, so that it starts as the model.
    Its optimizer does not go back to orthonormal columns in every step, but is drawn to
    them by its gradient, without a decomposition::

        optax.chain(lrjax.landing_field(1.0), optax.adamw(learning_rate, weight_decay=0.0))

    Args:
        rank: the width of the factors.
        alpha: the numerator of the scale, ``rank`` by default.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: as for StelLA.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> polar = lrjax.adapters.PoLAR(rank=2)
        >>> adapters = lrjax.adapt(model, polar, key=jax.random.key(1))
        >>> sum(x.size for x in jax.tree.leaves(lrjax.partition(adapters)[0]))
        26

    Reference:
        K. Lion, L. Zhang, B. Li, N. He, "PoLAR: polar-decomposed low-rank adapter
        representation" (2025), arXiv:2506.03133.
    """

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        super().__init__(rank, alpha, core=0.0, dropout=dropout, dtype=dtype)
