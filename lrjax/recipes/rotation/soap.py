from typing import Literal

import optax
from jaxtyping import ArrayLike

from ... import subspaces as sub
from ...transforms import rotate_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    decay: ArrayLike | None = None,
    refresh_every: int = 10,
    side: Literal["both", "short", "long", "left", "right"] = "both",
    max_side: int = 10000,
    weight_decay: ArrayLike = 0.01,
    where: Where = sub.is_hidden_matrix,
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
        max_side: sides longer than this are not rotated.
        weight_decay: decoupled weight decay.
        where: which leaves to rotate; see :func:`lrjax.rotate_updates`. The others get
            plain Adam.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.rotate_updates`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.soap(3e-3)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        N. Vyas, D. Morwani, R. Zhao, M. Kwun, I. Shapira, D. Brandfonbrener, L. Janson,
        S. Kakade, "SOAP" (2024), arXiv 2409.11321. Special case: gradients ``A G Bᵀ``
        with orthogonal ``A``, ``B`` give the updates ``A U Bᵀ``.
    """
    tx = rotate_updates(
        optax.scale_by_adam(b1, b2, eps),
        b2 if decay is None else decay,
        refresh_every=refresh_every,
        side=side,
        max_side=max_side,
        where=where,
    )
    return finish(tx, learning_rate, weight_decay)
