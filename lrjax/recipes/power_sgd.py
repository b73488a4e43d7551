from collections.abc import Sequence

import jax
import optax
from jax import lax
from jaxtyping import ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from .._matrices import DefaultRule, resolve_rank
from ..transforms import compress_momentum
from ._common import DecayMask, finish


@checks_trees
def power_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    axis_name: str | Sequence[str] | None = None,
    momentum: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """PowerSGD: data-parallel SGD that sends two thin factors instead of a gradient.

    Each device adds its own gradient to what it could not send before, ``E ← E + G``, and
    the devices agree on one warm power step of the mean of all ``E (m, n)``::

        P = orth(mean(E Q))    R = mean(Eᵀ P)    E ← E − P Rᵀ    Q ← R
        M ← λ M + P Rᵀ         U = P Rᵀ + M

    Both means are over ``axis_name`` and of ``(m + n) r`` numbers together; the full
    gradient is never reduced. Without compression it is SGD with momentum on the mean
    gradient; the updates ``P Rᵀ`` and the mean of ``E`` together lose nothing of it.

    The parameters, the momentum and ``Q`` are the same on all devices, each ``E`` is its
    device's own: :func:`lrjax.data_parallel_specs` tells ``shard_map`` so.

    Args:
        learning_rate: a number or a schedule.
        rank: an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for 4.
        axis_name: the mapped axis, or axes, over which data are split. None for a single
            device: SGD with error feedback.
        momentum: ``λ``.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to compress; the others are averaged whole. By default every matrix,
            leading axes being a batch, whose factors have at most half its numbers.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the first ``Q``; the same on all devices.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.compress_momentum`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.power_sgd(1.0, rank=2)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

        A data-parallel step is written out at :func:`lrjax.data_parallel_specs`.

    Reference:
        T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD: practical low-rank gradient
        compression for distributed optimization" (2019), arXiv 1905.13727. Special case:
        at full rank, SGD with momentum on the mean gradient.
    """
    rank = 4 if rank is None else rank

    def pays(path, shape):
        if len(shape) < 2:
            return False
        m, n = shape[-2:]
        return 2 * (m + n) * resolve_rank(rank, path, m, n) <= m * n

    reduce = None if axis_name is None else (lambda x: lax.pmean(x, axis_name))
    tx = optax.chain(
        compress_momentum(
            rank,
            0.0,
            normalize="none",
            reduce=reduce,
            where=DefaultRule(pays) if where is None else where,
            precision=precision,
            key=key,
        ),
        _add_momentum(momentum),
    )
    return finish(tx, learning_rate, weight_decay, mask)


def _add_momentum(decay: ArrayLike) -> optax.GradientTransformation:
    """``M ← λ M + G``, ``U = G + M``."""
    trace = optax.trace(decay)

    def update(updates, state, params=None):
        momentum, state = trace.update(updates, state, params)
        return jax.tree.map(lambda g, m: g + m, updates, momentum), state

    return optax.GradientTransformation(trace.init, update)
