from typing import Literal

import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def grass(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    scale: ArrayLike = 0.25,
    choice: Literal["topk", "sampled", "uniform"] = "topk",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Grass: Adam on a few rows of each gradient.

    The basis is a selection of ``r`` rows along the short side, so that projecting takes
    no arithmetic and the basis ``r`` indices. A refresh starts the moments anew, as if all
    gradients had been like the present one (:class:`lrjax.subspaces.SeededReset`).

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: the period of the selection.
        scale: factor of the update of projected leaves.
        choice: the rows of largest norm, drawn by their squared norms and scaled to be
            unbiased, or any; see :class:`lrjax.subspaces.SelectedRows`.
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
        >>> tx = lrjax.grass(0.3, rank=2, refresh_every=2)
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
        A. Muhamed, O. Li, D. Woodruff, M. Diab, V. Smith, "Grass: compute efficient
        low-memory LLM training with structured sparse gradients" (2024), arXiv
        2406.17660. At full rank it is Adam.
    """
    rank = 0.25 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.SelectedRows(rank, choice=choice),
        schedule=sub.Periodic(refresh_every),
        carry=sub.SeededReset(b1, b2),
        lift=sub.Project(scale),
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)
