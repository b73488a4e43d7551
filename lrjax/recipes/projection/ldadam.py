import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 16,
    *,
    b1: ArrayLike = 0.908,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    error_feedback: bool = True,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: Adam in a subspace that moves on every step, with its moments moved along.

    A power step on ``b1 · P m̂ + (1−b1) · G`` turns the basis; both moments follow it by
    :func:`lrjax.subspaces.rotate_variance`, and what the subspace cannot hold is fed back
    into the next gradient. That buffer has the size of the parameters.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        b1: decay of the first moment, and weight of the momentum in the power step.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        error_feedback: whether to keep the buffer.
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
        >>> tx = lrjax.ldadam(1e-3, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam" (2024), arXiv
        2410.16103.
    """
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.power(rank, blend=b1, start=sub.svd(rank)),
        schedule=sub.always(),
        carry=sub.rotate_variance(b1, b2),
        feedback=sub.error_feedback(b1) if error_feedback else None,
        where=where,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay)
