from typing import Literal

import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..transforms import compress_momentum
from ._common import DecayMask, elsewhere, finish
from ._neurons import outputs_as_rows, outputs_over_inputs


@checks_trees
def dion(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    momentum: ArrayLike = 0.95,
    normalize: Literal["columns", "qr"] = "columns",
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.01,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dion: orthonormalized momentum of low rank, by one warm power step.

    ``U = √(m/n) · P Qᵀ`` for a matrix of ``m`` outputs and ``n`` inputs, with ``P`` and
    ``Q`` as in :func:`lrjax.compress_momentum`. The rows are the outputs, as in Equinox,
    but for leaves called ``kernel``, which Flax stores ``(inputs, outputs)``, and the right
    factor of a :class:`lrjax.LowRank`; other layouts are told by ``where``, whose
    :class:`~lrjax.subspaces.MatrixSpec` names the rows. On factors the rank is theirs, and
    this is :func:`lrjax.muon` in the end: a full rank compresses nothing.
    It saves computation and communication, not memory: the momentum has the size of the
    parameters.

    Args:
        learning_rate: a number or a schedule.
        rank: an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        momentum: decay of the momentum that the low rank has captured.
        normalize: of ``Q``. ``"columns"`` gives its columns unit length, as Dion does;
            ``"qr"`` makes them orthonormal, which is Orth-Dion: every update then has
            ``r`` singular values of ``√(m/n)``, on the way to convergence too.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the first ``Q``.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.compress_momentum`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.dion(0.5, rank=2)
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
        K. Ahn, B. Xu, N. Abreu, J. Langford, "Dion: distributed orthonormalized updates"
        (2025), arXiv 2504.05295. Special case: a constant momentum converges to its polar
        factor of rank ``r``. ``"qr"``: T. Nakamori et al., "Orth-Dion: eliminating
        geometric mismatch in distributed low-rank spectral optimization" (2026), arXiv
        2605.16341.
    """
    where = outputs_as_rows(where)
    tx = optax.chain(
        compress_momentum(
            0.25 if rank is None else rank,
            momentum,
            normalize=normalize,
            where=where,
            precision=precision,
            key=key,
        ),
        outputs_over_inputs(where),
        elsewhere(fallback, where),
    )
    return finish(tx, learning_rate, weight_decay, mask)
