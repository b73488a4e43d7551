"""Learning in stages: the limit of a small start."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..gradient_flow import gradient_flow
from ..until import stationary


class Stages(NamedTuple):
    """The stages of learning from a vanishing start.

    Attributes:
        times: when each begins, in units of ``ln(1/α)``; infinite for stages that are not.
        weights: where each ends.
        losses: the loss there.
    """

    times: Float[Array, " stages"]
    weights: Float[Array, "stages k"]
    losses: Float[Array, " stages"]


def gradual_stages(
    loss: Callable[..., Array], size: int, *args: Any, stages: int
) -> Stages:
    """The gradient flow of ``w = u ⊙ v`` from a start of size ``α → 0``: one by one.

    ``(u ± v)²`` grow as ``e^{±2Γ}`` with ``dΓ/dt = −∂L/∂w``. In the time ``τ = t/ln(1/α)``
    the weights jump from a saddle to the next, and in between only ``Γ/ln(1/α)`` moves, at
    the rate of the gradient where the weights are. A weight wakes when its own reaches one;
    then it and those awake go, within no time, to a minimum of the loss over them all. For
    a diagonal layer of attention each stage adds at most one to the ranks of its weights.

    Times of a flow from α are ``τ ln(1/α)`` and a number that does not depend on α.

    Args:
        loss: ``loss(w, *args)`` of the vector of weights.
        size: their number.
        *args: data.
        stages: how many to follow, static. No weight may go back to zero on the way.

    Returns:
        :class:`Stages`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> loss = lambda w, target: 0.5 * jnp.sum((w - target) ** 2)
        >>> target = jnp.array([0.5, -2.0])
        >>> found = lrjax.flows.gradual_stages(loss, 2, target, stages=2)
        >>> print(found.times)
        [0.5 2. ]

    Reference:
        E. Boix-Adsera, E. Littwin, E. Abbe, S. Bengio, J. Susskind, "Transformers learn
        through gradual rank increase" (2023), arXiv 2306.07042.
    """

    def along(roots, signs, args):
        return loss(signs * roots**2, *args)

    def stage(carry, _):
        now, signs, charge, roots = carry
        push = -jax.grad(loss)(signs * roots**2, *args)
        asleep = (signs == 0) & (push != 0)
        rate = jnp.where(asleep, jnp.abs(push), 1)
        waits = jnp.where(asleep, (1 - jnp.sign(push) * charge) / rate, jnp.inf)
        wait, wakes = jnp.min(waits), jnp.arange(size) == jnp.argmin(waits)
        wakes = wakes & jnp.isfinite(wait)
        charge = jnp.where(asleep & jnp.isfinite(wait), charge + push * wait, charge)
        signs = jnp.where(wakes, jnp.sign(push), signs)
        start = jnp.where(wakes, 1e-3, roots)
        end = gradient_flow(
            along, start, signs, args, t1=1e5, rtol=rtol, until=stationary(100 * rtol)
        ).params
        roots = jnp.where(jnp.isfinite(wait), end, roots)
        weights = signs * roots**2
        out = Stages(now + wait, weights, loss(weights, *args))
        return (now + wait, signs, charge, roots), out

    zeros = jnp.zeros(size)
    rtol = max(1e-10, 20 * float(jnp.finfo(zeros.dtype).eps))
    return lax.scan(stage, (zeros[0], zeros, zeros, zeros), length=stages)[1]
