import optax
from jaxtyping import ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from ..transforms import normalize_rows
from ._common import DecayMask, chosen, elsewhere, finish
from ._neurons import orthogonalize_some, outputs_as_rows, outputs_over_inputs


@checks_trees
def dion3(
    learning_rate: optax.ScalarOrSchedule,
    fraction: float | None = None,
    *,
    momentum: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.01,
    mask: DecayMask = None,
    where: sub.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dion3: Dion2 on outputs, with a learning rate of its own for each of them.

    ``U = √(m/n) N``, where ``N`` is the polar factor of the ``⌈fraction · m⌉`` largest
    rows of the momentum, as in :func:`lrjax.dion2`, after
    :func:`lrjax.normalize_rows`. It always chooses among the ``m`` outputs, never more
    of them than there are inputs: no more rows can be orthonormal. Also called NorDion2.

    Departures from the official code: that limit, and the polar factor is exact to
    rounding, not that of five steps in bfloat16.

    Args:
        learning_rate: a number or a schedule.
        fraction: of the outputs; None stands for a quarter.
        momentum: decay of the rows that are used.
        b2: decay of the mean squares of the rows of the polar factor.
        eps: added to their roots.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay, of all rows.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat; see :func:`lrjax.dion2`.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: for a ``fraction`` outside (0, 1], and as
            :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.dion3(0.5, 0.5)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - jnp.eye(8, 16)) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state, before = tx.init(params), loss(params)
        >>> for _ in range(4):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5 * before)
        True

    Reference:
        The microsoft/dion repository (2026), where it is NorDion2; K. Ahn, N. Amsel,
        J. Langford, "Dion2: a simple method to shrink matrix in Muon" (2025), arXiv
        2512.16928. Special case: with ``fraction=1`` and no more outputs than inputs,
        :func:`lrjax.normuon` at another scale.
    """
    where = outputs_as_rows(where)
    tx = optax.chain(
        chosen(orthogonalize_some(fraction, momentum, "left", where), where),
        normalize_rows(b2, eps, where=where),
        outputs_over_inputs(where),
        elsewhere(fallback, where),
    )
    return finish(tx, learning_rate, weight_decay, mask)
