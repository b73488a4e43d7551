import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ..transforms import limit_norm_growth, orthogonalize_updates
from ._common import DecayMask, chosen, elsewhere, finish


@checks_trees
def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    scale: ArrayLike = 1.0,
    momentum: ArrayLike = 0.95,
    max_growth: ArrayLike | None = 1.01,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SUMO: momentum in a subspace, with all of its singular values set to one, exactly.

    ``M ← momentum · M + Pᵀ G``, ``U = scale · P polar(M)``, the polar factor of the small
    ``(r, n)`` momentum by an exact SVD; ``P`` comes from a randomized SVD every
    ``refresh_every`` steps and the momentum moves along. The norm of a step grows by at
    most ``max_growth``.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: the period of the basis.
        scale: factor of the update of projected leaves.
        momentum: decay of the momentum.
        max_growth: the limit; None for none.
        fallback: transform of the leaves that are not projected; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get ``fallback``.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.sumo(0.5, rank=2)
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
        Y. Refael, G. Smorodinsky, T. Tirer, O. Lindenbaum, "SUMO: subspace-aware
        moment-orthogonalization for accelerating memory-efficient LLM training" (2025),
        arXiv 2505.24749. Special case: at full rank, the polar factor of plain momentum.
    """
    rank = 0.25 if rank is None else rank
    inner = optax.chain(
        optax.trace(momentum),
        orthogonalize_updates("svd", where=lambda path, shape: True),
        optax.identity() if max_growth is None else limit_norm_growth(max_growth),
    )
    tx = project_updates(
        inner,
        sub.RandomizedSVD(rank),
        schedule=sub.Periodic(refresh_every),
        carry=sub.Rotate(),
        lift=sub.Project(scale),
        where=where,
        precision=precision,
        key=key,
    )
    tx = optax.chain(chosen(tx, where), elsewhere(fallback, where))
    return finish(tx, learning_rate, weight_decay, mask)
