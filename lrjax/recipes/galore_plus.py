import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def galore_plus(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    scale: ArrayLike = 0.25,
    fraction: float | None = None,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore+: GaLore with one basis for all heads of a layer, and a sparse residual.

    Every ``refresh_every`` steps a randomized SVD of one head, drawn at random, sets the
    basis of all of them, for a fraction of the price. ``U = scale · (P adam(Pᵀ G) + S)``;
    ``S`` is Adam on a fixed set of entries of what the basis leaves out. Heads are the
    last batch axis of a leaf: ``(…, heads, m, n)``; where they are fused into the rows,
    let ``where`` answer ``MatrixSpec(blocks=heads)``. A matrix without batch axes has a
    basis of its own.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: the period of the basis.
        scale: factor of the update of projected leaves.
        fraction: of the entries of a matrix that ``S`` holds; None stands for 0.01.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain Adam.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.galore_plus(0.3, rank=2)
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
        X. Liao, S. Li, Y. Xu, Z. Li, Y. Liu, Y. He, "GaLore+: boosting low-rank
        adaptation for LLMs with cross-head projection" (2024), arXiv 2412.19820. Special
        case: for a matrix without heads it is :func:`lrjax.galore` by randomized SVDs,
        but for the entries of ``S``.
    """
    fraction = 0.01 if fraction is None else fraction
    rank = 0.25 if rank is None else rank
    adam = optax.scale_by_adam(b1, b2, eps)
    tx = project_updates(
        adam,
        sub.Shared(sub.RandomizedSVD(rank)),  # pyright: ignore[reportCallIssue]
        schedule=sub.Periodic(refresh_every),
        lift=sub.SparseResidual(fraction, inner=adam, scale=scale),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)
