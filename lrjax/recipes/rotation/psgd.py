import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ...transforms import scale_by_low_rank_curvature
from .._finish import finish


def psgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 10,
    *,
    rate: ArrayLike = 0.1,
    clip_rms: ArrayLike | None = 2.0,
    weight_decay: ArrayLike = 0.0,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """PSGD with a low-rank plus diagonal preconditioner of all parameters together.

    ``U = P g`` with ``P`` as fitted by :func:`lrjax.scale_by_low_rank_curvature`: it
    whitens the gradients, entries of ``U`` having a mean square of about one, or, where
    each ``update`` gets a ``pair=(v, H v)`` with Gaussian ``v``, approximates the inverse
    Hessian. The state has ``2 r + 1`` numbers a parameter.

    Args:
        learning_rate: a number or a schedule.
        rank: ``r``.
        rate: of the fit of the preconditioner.
        clip_rms: limit of the root mean square of ``U``, and a fifth of the limit of its
            entries. None for no limit, which Newton's method with pairs needs.
        weight_decay: decoupled weight decay.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.scale_by_low_rank_curvature`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.psgd(1e-3, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16)), "bias": jnp.ones(8)})

    Reference:
        X.-L. Li, "Black box Lie group preconditioners for SGD" (2022), arXiv 2211.04422;
        O. Pooladzandi, X.-L. Li (2024), arXiv 2402.04553. Special case: the update of a
        first gradient does not depend on its size.
    """
    tx = scale_by_low_rank_curvature(rank, rate, key=key)
    if clip_rms is not None:
        tx = optax.chain(tx, optax.stateless(lambda u, _: _clip(u, clip_rms)))
    return finish(tx, learning_rate, weight_decay)


def _clip(updates, rms: ArrayLike):
    leaves = jax.tree.leaves(updates)
    squares = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves)
    size = jnp.sqrt(squares / sum(x.size for x in leaves))
    scale = jnp.where(size > rms, rms / jnp.where(size > 0, size, 1), 1)
    bounded = lambda x: jnp.clip(scale * x, -5 * rms, 5 * rms).astype(x.dtype)
    return jax.tree.map(bounded, updates)
