import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def golore(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    switch_at: ArrayLike = 0,
    refresh_every: int = 200,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore that ends with random subspaces, and so converges on noisy gradients.

    Up to the step ``switch_at`` the basis is that of the SVD, from then on uniformly
    random. The first moment is moved into each new basis.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        switch_at: the step; 0 for random subspaces throughout. The paper
            switches after 80 % of the steps.
        refresh_every: the period of the basis.
        scale: factor of the update of projected leaves.
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
        >>> tx = lrjax.golore(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        Y. He, P. Li, Y. Hu, C. Chen, K. Yuan (2024), arXiv 2410.11289.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.switch(sub.svd(rank), sub.random_orthonormal(rank), switch_at),
        schedule=sub.every(refresh_every),
        carry=sub.rotate(),
        lift=sub.project(scale),
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)
