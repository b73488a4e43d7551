import optax
from jaxtyping import ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from ._common import DecayMask, chosen, elsewhere, finish
from ._neurons import orthogonalize_some, outputs_as_rows, outputs_over_inputs


@checks_trees
def dion2(
    learning_rate: optax.ScalarOrSchedule,
    fraction: float | None = None,
    *,
    momentum: ArrayLike = 0.95,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.01,
    mask: DecayMask = None,
    where: sub.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dion2: Muon on the largest rows of the momentum alone, which decay as they are used.

    For a matrix of ``m`` outputs and ``n`` inputs, ``m <= n``, in this order::

        M ← M + G
        S = the ⌈fraction · m⌉ rows of M with the largest sums of magnitudes
        U = √(m/n) polar(M_S) in the rows S, zero in the others
        M_S ← momentum · M_S

    and with columns in the place of rows where ``m > n``. A step orthogonalizes a quarter
    of the matrix; what waits in the other rows grows until it is chosen. The rows are the
    outputs, as in Equinox, but for leaves called ``kernel``, which Flax stores ``(inputs,
    outputs)``, and the right factor of a :class:`lrjax.LowRank`; other layouts are told by
    ``where``, whose :class:`~lrjax.subspaces.MatrixSpec` names the rows. It saves
    computation, not memory: the momentum has the size of the parameters.

    Departure from the official code: the polar factor is exact to rounding, not that of
    five steps in bfloat16.

    Args:
        learning_rate: a number or a schedule.
        fraction: of the short side; None stands for a quarter.
        momentum: decay of the rows that are used.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay, of all rows.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: for a ``fraction`` outside (0, 1], and as
            :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.dion2(0.5, 0.5)
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
        K. Ahn, N. Amsel, J. Langford, "Dion2: a simple method to shrink matrix in Muon"
        (2025), arXiv 2512.16928. Special case: with ``fraction=1`` Muon without
        Nesterov's step, its momentum a sum.
    """
    where = outputs_as_rows(where)
    tx = optax.chain(
        chosen(orthogonalize_some(fraction, momentum, "short", where), where),
        outputs_over_inputs(where),
        elsewhere(fallback, where),
    )
    return finish(tx, learning_rate, weight_decay, mask)
