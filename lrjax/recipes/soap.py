from typing import Literal

import optax
from jaxtyping import Array, ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from ..transforms import rotate_updates
from ._common import DecayMask, finish


@checks_trees
def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    decay: ArrayLike | None = None,
    refresh_every: int | Array = 10,
    side: Literal["both", "short", "long", "left", "right"] = "both",
    max_side: int | None = None,
    weight_decay: ArrayLike = 0.01,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in the eigenbases of Shampoo's two preconditioners.

    ``U = Q_l Adam(Q_lᵀ G Q_r) Q_rᵀ`` with ``Q_l``, ``Q_r`` the eigenvectors of running
    averages of ``G Gᵀ`` and ``Gᵀ G``, turned by one power step every ``refresh_every``
    steps; see :func:`lrjax.rotate_updates`. The first step only sets the bases and moves
    nothing. ``side="short"`` is its one-sided form: half of the work, and for long
    matrices a small part of the ``2 m² + 2 n²`` numbers of memory. It is the quality
    reference for optimizers in subspaces, which keep some columns of ``Q`` alone.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the bias-corrected second moment.
        decay: of the averaged Gram matrices; ``b2`` by default.
        refresh_every: steps between two refreshes of a leaf; leaves take turns.
        side: which sides of a matrix are rotated.
        max_side: sides longer than this are not rotated; None stands for 10,000.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to rotate; see :func:`lrjax.rotate_updates`. The others get
            plain Adam.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.rotate_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.soap(0.3)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

        One-sided, the state of a long matrix is little more than Adam's:

        >>> params = {"weight": jnp.zeros((64, 1024))}
        >>> for side in ("both", "short"):
        ...     tx = lrjax.soap(1e-3, side=side)
        ...     print(round(lrjax.metrics.memory_report(params, tx).ratio, 2))
        17.06
        1.06

    Reference:
        N. Vyas, D. Morwani, R. Zhao, M. Kwun, I. Shapira, D. Brandfonbrener, L. Janson,
        S. Kakade, "SOAP: improving and stabilizing Shampoo using Adam" (2024), arXiv
        2409.11321. Special case: gradients ``A G Bᵀ`` with orthogonal ``A``, ``B`` give
        the updates ``A U Bᵀ``.
    """
    max_side = 10000 if max_side is None else max_side
    tx = rotate_updates(
        optax.scale_by_adam(b1, b2, eps),
        b2 if decay is None else decay,
        refresh_every=refresh_every,
        side=side,
        max_side=max_side,
        where=where,
        precision=precision,
    )
    return finish(tx, learning_rate, weight_decay, mask)
