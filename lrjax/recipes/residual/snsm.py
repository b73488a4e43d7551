import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates, scale_by_subset_norm
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def snsm(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 128,
    *,
    refresh_every: int = 200,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SNSM: momentum in a subspace, one second moment for each row of the longer side.

    ``U = (P m̂ + (G − P Pᵀ G)) / (√v̂ + ε)`` with ``m ← b1 m + (1−b1) Pᵀ G``,
    bias-corrected and forgotten when the SVD renews ``P``, and the subset norms ``v̂`` of
    :func:`lrjax.scale_by_subset_norm`. A matrix of ``m <= n`` takes ``m r + r n + n``
    numbers. ``v̂`` holds sums, not means: rates are some ten times Adam's.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the SVD.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            keep their momentum whole.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.snsm(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        T. Nguyen, H. L. Nguyen, "Subset-Norm and Subspace-Momentum" (2024), arXiv
        2411.07120. At full rank, with the basis kept, it is :func:`lrjax.adam_sn`.
    """
    momentum = project_updates(
        optax.ema(b1),
        sub.svd(rank),
        schedule=sub.every(refresh_every),
        carry=sub.reset(),
        lift=sub.residual(),
        where=where,
        key=key,
    )
    tx = scale_by_subset_norm(b2, eps, numerator=momentum)
    return finish(tx, learning_rate, weight_decay)
