import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from .._arguments import checks_trees
from ..transforms import scale_by_psgd
from ._common import DecayMask, finish


@checks_trees
def psgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    rate: ArrayLike = 0.1,
    clip_rms: ArrayLike | None = 2.0,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """PSGD with a low-rank plus diagonal preconditioner of all parameters together.

    ``U = P g`` with ``P`` as fitted by :func:`lrjax.scale_by_psgd`: it
    whitens the gradients, entries of ``U`` having a mean square of about one, or, where
    each ``update`` gets a ``pair=(v, H v)`` with Gaussian ``v``, approximates the inverse
    Hessian. The state has ``2 r + 1`` numbers a parameter.

    Args:
        learning_rate: a number or a schedule.
        rank: ``r``; None stands for 10.
        rate: of the fit of the preconditioner.
        clip_rms: limit of the root mean square of ``U``, and a fifth of the limit of its
            entries. None for no limit, which Newton's method with pairs needs.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.scale_by_psgd`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.psgd(0.1, rank=2)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

    Reference:
        X.-L. Li, "Black box Lie group preconditioners for SGD" (2022), arXiv 2211.04422;
        O. Pooladzandi, X.-L. Li, "Curvature-informed SGD via general purpose Lie-group
        preconditioners" (2024), arXiv 2402.04553. Special case: the update of a first
        gradient does not depend on its size.
    """
    rank = 10 if rank is None else rank
    tx = scale_by_psgd(rank, rate, key=key)
    if clip_rms is not None:
        tx = optax.chain(tx, optax.stateless(lambda u, _: _clip(u, clip_rms)))
    return finish(tx, learning_rate, weight_decay, mask)


def _clip(updates, rms: ArrayLike):
    leaves = jax.tree.leaves(updates)
    squares = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves)
    size = jnp.sqrt(squares / sum(x.size for x in leaves))
    scale = jnp.where(size > rms, rms / jnp.where(size > 0, size, 1), 1)
    bounded = lambda x: jnp.clip(scale * x, -5 * rms, 5 * rms).astype(x.dtype)
    return jax.tree.map(bounded, updates)
