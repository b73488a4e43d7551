from typing import Literal

import jax.tree_util as jtu
import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import compress_momentum
from ...transforms.subspace.project_updates import Where
from .._finish import finish
from ._others import elsewhere


def dion(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    decay: ArrayLike = 0.95,
    normalize: Literal["columns", "qr"] = "columns",
    others: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.01,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Dion: orthonormalized momentum of low rank, by one warm power step.

    ``U = √(m/n) · P Qᵀ`` for a matrix of ``m`` outputs and ``n`` inputs, with ``P`` and
    ``Q`` as in :func:`lrjax.compress_momentum`. It saves computation and communication,
    not memory: the momentum has the size of the parameters.

    Args:
        learning_rate: a number or a schedule.
        rank: an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        decay: of the momentum that the low rank has captured.
        normalize: of ``Q``. ``"columns"`` gives its columns unit length, as Dion does;
            ``"qr"`` makes them orthonormal, which is Orth-Dion: every update then has
            ``r`` singular values of ``√(m/n)``, on the way to convergence too.
        others: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.
        key: source of the first ``Q``.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.compress_momentum`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.dion(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        K. Ahn, B. Xu, N. Abreu, J. Langford, "Dion" (2025), arXiv 2504.05295. Special
        case: a constant momentum converges to its polar factor of rank ``r``. ``"qr"``:
        "Orth-Dion" (2026), arXiv 2605.16341.
    """

    def outputs_over_inputs(updates, params=None):
        del params

        def scale(path, u):
            spec = where(jtu.keystr(path), u.shape)
            if not spec:
                return u
            spec = spec if isinstance(spec, sub.MatrixSpec) else sub.MatrixSpec()
            m, n = sub.matrix_shape(u.shape, spec)[-2:]
            return u * (m / n) ** 0.5

        return jtu.tree_map_with_path(scale, updates)

    tx = optax.chain(
        compress_momentum(
            rank,
            decay,
            normalize=normalize,
            where=where,
            key=key,
        ),
        optax.stateless(outputs_over_inputs),
        elsewhere(others, where),
    )
    return finish(tx, learning_rate, weight_decay)
