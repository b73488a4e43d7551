from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from ..linalg import nonzero
from ..transforms import scale_by_psgd_kron
from ._common import DecayMask, chosen, elsewhere, finish, scale_by_rms


@checks_trees
def psgd_kron(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
    rate: ArrayLike = 0.1,
    clip_rms: ArrayLike | None = 1.1,
    max_side: int | None = None,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """PSGD Kron: momentum, whitened from both sides of each matrix.

    ``U = P_l M̂ P_r`` with the bias-corrected average ``M̂`` of the gradients and the
    preconditioners that :func:`lrjax.scale_by_psgd_kron` fits to it, on every step, and
    ``U`` no larger than ``clip_rms`` in root mean square. For a matrix ``(m, n)`` the
    state is ``m n + m² + n²`` numbers.

    Departures from the official codes: the noise on the gradients is averaged instead of
    drawn, norms are found by power steps from the largest column, and the first scale of
    each matrix is its own. Leaves that are no matrices get ``fallback``.

    Args:
        learning_rate: a number or a schedule.
        momentum: decay of the average.
        rate: of the fit of the preconditioners.
        clip_rms: limit of the root mean square of the update of a matrix; None for none.
        max_side: longer sides get a diagonal preconditioner; None stands for 8192.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.scale_by_psgd_kron`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.psgd_kron(0.2)
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
        O. Pooladzandi, X.-L. Li, "Curvature-informed SGD via general purpose Lie-group
        preconditioners" (2024), arXiv 2402.04553; defaults of the kron_torch repository.
        Special case: a constant square gradient of full rank ends in ``√m`` times its
        polar factor, whose root mean square is one.
    """
    tx = optax.chain(
        chosen(optax.ema(momentum), where),
        scale_by_psgd_kron(
            rate, max_side=8192 if max_side is None else max_side, where=where
        ),
        optax.identity() if clip_rms is None else scale_by_rms(_at_most(clip_rms), where),
        elsewhere(fallback, where),
    )
    return finish(tx, learning_rate, weight_decay, mask)


def _at_most(rms: ArrayLike) -> Callable[[Array], Array]:
    """The factor of a matrix by its root mean square, which so does not exceed ``rms``."""
    return lambda size: jnp.where(size > rms, rms / nonzero(size), 1)
