import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def galore_plus(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 0.25,
    fraction: float = 0.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
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
            ``(path, (rows, columns))``.
        refresh_every: the period of the basis.
        scale: factor of the update of projected leaves.
        fraction: of the entries of a matrix that ``S`` holds.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain Adam.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.galore_plus(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        "GaLore+" (2024), arXiv 2412.19820. Special case: for a matrix without heads it is
        :func:`lrjax.galore` by randomized SVDs, but for the entries of ``S``.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    tx = project_updates(
        adam,
        sub.shared(sub.randomized_svd(rank)),
        schedule=sub.every(refresh_every),
        lift=sub.sparse_residual(fraction, adam, scale),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)
