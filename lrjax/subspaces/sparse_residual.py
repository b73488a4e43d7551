import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, ArrayLike, Int

from .._sharding import by_compiler, placed_like, sharding_along
from .lifts import Lift, Projected


class SparseResidual(Lift):
    """``U = scale · (P N + S)``: a few entries outside the subspace, with their moments.

    ``S`` is zero but at a fixed set of entries, where it is what ``inner`` makes of those
    entries of the residual ``a − P R``. They are one out of each of ``k = fraction · m n``
    runs of entries, drawn at random once and for all, and not stored. The state is that
    of ``inner`` for ``k`` numbers a matrix.

    Args:
        fraction: of the entries of a matrix, in (0, 1].
        inner: an elementwise transform.
        scale: factor.

    Raises:
        ValueError: for a fraction outside (0, 1].

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.SVD(4), lift=sub.SparseResidual(0.01)
        ... )

    Reference:
        X. Liao, S. Li, Y. Xu, Z. Li, Y. Liu, Y. He, "GaLore+: boosting low-rank
        adaptation for LLMs with cross-head projection" (2024), arXiv 2412.19820.
    """

    fraction: float
    _: dataclasses.KW_ONLY
    inner: optax.GradientTransformation = optax.scale_by_adam()
    scale: ArrayLike = 1.0

    def __check_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"SparseResidual needs a fraction in (0, 1], got {self.fraction}."
            )

    needs_orthonormal: ClassVar[bool] = True

    def init(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The state of ``inner`` for the chosen entries."""
        count = max(1, round(self.fraction * shape[-2] * shape[-1]))
        return self.inner.init(jnp.zeros((*shape[:-2], count), dtype))

    def __call__(self, x: Projected, state: Any) -> tuple[Array, Any]:
        """The lifted step, and more at the chosen entries."""
        a, lift = x.gradient, x.projector.lift
        entries = _entries(a.shape[-2] * a.shape[-1], self.fraction)
        flat = lambda y: y.reshape(*y.shape[:-2], -1)
        pick = lambda y, entries: flat(y)[..., entries]
        add = lambda y, entries, z: flat(y).at[..., entries].add(z).reshape(y.shape)
        layers = sharding_along(a, (*range(a.ndim - 2), None))
        like = sharding_along(a)
        outside = placed_like(a - lift(x.projected), a)
        residual = by_compiler(pick, outside, entries, out=layers)
        step, state = self.inner.update(residual, state)
        update = by_compiler(add, lift(x.step), entries, step, out=like)
        return self.scale * update, state


def _entries(size: int, fraction: float) -> Int[Array, " k"]:
    """One entry out of each of ``k`` runs of nearly equal length, in rising order."""
    count = max(1, round(fraction * size))
    each, rest = divmod(size, count)
    run = jnp.arange(count)
    start, length = run * each + jnp.minimum(run, rest), each + (run < rest)
    share = jr.uniform(jr.key(0), (count,))
    return start + jnp.minimum((share * length).astype(jnp.int32), length - 1)
