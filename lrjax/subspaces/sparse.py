import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, ArrayLike, Int

from .lift import Lift


def sparse_residual(
    fraction: float,
    inner: optax.GradientTransformation | None = None,
    scale: ArrayLike = 1.0,
) -> Lift:
    """``U = scale · (P N + S)``: a few entries outside the subspace, with their moments.

    ``S`` is zero but at a fixed set of entries, where it is what ``inner`` makes of those
    entries of the residual ``a − P R``. They are one out of each of ``k = fraction · m n``
    runs of entries, drawn at random once and for all, and not stored.

    Args:
        fraction: of the entries of a matrix, in (0, 1].
        inner: an elementwise transform; ``optax.scale_by_adam()`` by default.
        scale: factor.

    Returns:
        The lift. Its state is that of ``inner`` for ``k`` numbers a matrix.

    Raises:
        ValueError: for a fraction outside (0, 1].

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), lift=sub.sparse_residual(0.01)
        ... )

    Reference:
        "GaLore+" (2024), arXiv 2412.19820.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"sparse_residual needs a fraction in (0, 1], got {fraction}.")
    inner = optax.scale_by_adam() if inner is None else inner

    def init(shape, dtype):
        size = shape[-2] * shape[-1]
        return inner.init(jnp.zeros((*shape[:-2], max(1, round(fraction * size))), dtype))

    def apply(x, state):
        a, frame = x.gradient, x.frame
        entries = _entries(a.shape[-2] * a.shape[-1], fraction)
        flat = lambda y: y.reshape(*y.shape[:-2], -1)
        residual = flat(a - frame.up(x.projected))[..., entries]
        step, state = inner.update(residual, state)
        update = flat(frame.up(x.step)).at[..., entries].add(step)
        return scale * update.reshape(a.shape), state

    return Lift(apply, init, needs_orthonormal=True)


def _entries(size: int, fraction: float) -> Int[Array, " k"]:
    """One entry out of each of ``k`` runs of nearly equal length, in rising order."""
    count = max(1, round(fraction * size))
    each, rest = divmod(size, count)
    run = jnp.arange(count)
    start, length = run * each + jnp.minimum(run, rest), each + (run < rest)
    share = jr.uniform(jr.key(0), (count,))
    return start + jnp.minimum((share * length).astype(jnp.int32), length - 1)
