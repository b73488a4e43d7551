"""What fine-tuning learns of its task and forgets of the one before."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._sharding import einsum
from ...linalg import eigh, times, weighted_svd
from ._rows import rows


class Forgetting(NamedTuple):
    """Losses on the new and the old task, from before to after fine-tuning.

    Attributes:
        target: on the new task.
        source: on the old task, where it was zero before.
    """

    target: Float[Array, " k"]
    source: Float[Array, " k"]


def forgetting_by_rank(
    change: Float[Array, "m n"],
    target: Float[Array, "n n"],
    source: Float[Array, "n n"],
) -> Forgetting:
    """LoRA of every rank in a linear model: the lower, the less learnt and forgotten.

    The weight is right for the old task, and the new one asks for the change ``T``. The
    best adapter of rank r for inputs of covariance C cuts the singular values of ``T C^½
    = U Σ Vᵀ``. With the covariance S of the old inputs::

        on the new task ½ Σ_{i > r} σ_i²
        on the old task ½ Σ_{i ≤ r} σ_i² v_iᵀ C^(−½) S C^(−½) v_i

    All terms are positive: both losses are monotone in the rank, whatever the tasks. It
    does not follow that LoRA forgets less where it learns as much: if the inputs of both
    tasks are white, full fine-tuning that is stopped early (:func:`forgetting_in_time`)
    forgets the least.

    Args:
        change: ``T``.
        target: ``C``, the covariance of the inputs of the new task.
        source: ``S``, that of the old one.

    Returns:
        :class:`Forgetting` of the ranks 0 to ``min(m, n)``; the last is full fine-tuning.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> change = jnp.diag(jnp.array([2.0, 1.0]))
        >>> curve = lrjax.flows.forgetting_by_rank(change, jnp.eye(2), 0.5 * jnp.eye(2))
        >>> print(curve.target, curve.source)
        [2.5 0.5 0. ] [0.   1.   1.25]

    Reference:
        D. Biderman et al., "LoRA learns less and forgets less" (2024), arXiv 2405.09673,
        observe it in language models; the linear model is derived here.
    """
    fit = weighted_svd(change, None, target, min(change.shape))
    learnt = 0.5 * fit.values**2
    lost = jnp.sum(fit.right * times(source, fit.right), axis=0)
    # From the end, so that what is left is exactly nothing at the last rank.
    rest = jnp.cumsum(learnt[::-1])[::-1]
    none = jnp.zeros(1, rest.dtype)
    return Forgetting(
        jnp.concatenate([rest, none]), jnp.concatenate([none, jnp.cumsum(learnt * lost)])
    )


def forgetting_in_time(
    t: Float[Array, "*t"],
    change: Float[Array, "m n"],
    target: Float[Array, "n n"],
    source: Float[Array, "n n"],
) -> Forgetting:
    """Full fine-tuning of a linear model by gradient flow, ``X(t) = T (I − e^{−Ct})``.

    Args:
        t: times.
        change: ``T``, as in :func:`forgetting_by_rank`.
        target: ``C``, the covariance of the inputs of the new task.
        source: ``S``, that of the old one.

    Returns:
        :class:`Forgetting` at the times t.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> eye, t = jnp.eye(2), jnp.array([0.0, 40.0])
        >>> curve = lrjax.flows.forgetting_in_time(t, 2 * eye, eye, eye)
        >>> print(curve.target, curve.source)
        [4. 0.] [0. 4.]

    Reference:
        The setting of D. Biderman et al., "LoRA learns less and forgets less" (2024), arXiv
        2405.09673; derived here.
    """
    rates, vectors = eigh(target)
    rates = jnp.maximum(rates, 0)
    t = jnp.asarray(t)[..., None]
    asked = times(change, vectors)
    overlap = times(asked.T, asked)
    old = times(times(vectors.T, source), vectors) * overlap
    missed = rows(rates * jnp.diagonal(overlap), t) * jnp.exp(-2 * rows(rates, t) * t)
    moved = -jnp.expm1(-rows(rates, t) * t)
    lost = einsum("...i,ij,...j->...", moved, old, moved)
    return Forgetting(0.5 * jnp.sum(missed, axis=-1), 0.5 * lost)
