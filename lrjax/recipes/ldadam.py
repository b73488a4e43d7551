import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ._common import DecayMask, finish


@checks_trees
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    b1: ArrayLike = 0.908,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    error_feedback: bool = True,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: Adam in a subspace that moves on every step, with its moments moved along.

    A power step on ``b1 · P m̂ + (1−b1) · G`` turns the basis; both moments follow it by
    :class:`lrjax.subspaces.RotateVariance`, and what the subspace cannot hold is fed back
    into the next gradient. That buffer has the size of the parameters.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for 16.
        b1: decay of the first moment, and weight of the momentum in the power step.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        error_feedback: whether to keep the buffer.
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
        >>> tx = lrjax.ldadam(0.1, rank=2)
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
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam: adaptive
        optimization from low-dimensional gradient statistics" (2024), arXiv 2410.16103.
    """
    rank = 16 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.Power(rank, blend=b1, first=sub.SVD(rank)),
        schedule=sub.Always(),
        carry=sub.RotateVariance(b1, b2),
        feedback=sub.ErrorFeedback(b1) if error_feedback else None,
        where=where,
        precision=precision,
        key=key,
    )
    return finish(tx, learning_rate, weight_decay, mask)
