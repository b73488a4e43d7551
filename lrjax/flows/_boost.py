"""The hyperbolic rotation of two factors into each other by the gradient flow."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..linalg import nonzero


class Boost(NamedTuple):
    """``τ(t)`` of a flow ``left cosh τ + right sinh τ``, and so on the other side.

    Attributes:
        growth: ``e^τ``.
        small: τ where it is small, to its own precision; 0 elsewhere.
        is_small: where.
    """

    growth: Array
    small: Array
    is_small: Array

    def __call__(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Both sides; a small one beside a large one keeps its digits."""
        cosh, sinh = jnp.cosh(self.small), jnp.sinh(self.small)
        plus, minus = (left + right) * self.growth, (left - right) / self.growth
        return (
            jnp.where(self.is_small, cosh * left + sinh * right, (plus + minus) / 2),
            jnp.where(self.is_small, cosh * right + sinh * left, (plus - minus) / 2),
        )


def boost(t: Array, rate: Array, damp: Array, drive: Array, speed: Array) -> Boost:
    """Half the logarithm of z with ``z' = a z + drive²/2 − z² damp²/2``, ``z(0) = 1``.

    ::

        z = (up + down·decay + drive²·span) / (down + up·decay + damp²·span)
        k = sqrt(a² + damp² drive²)   up = (k + a)/k   down = (k − a)/k
        decay = e^{−kt}               span = (1 − e^{−kt})/k

    No term is negative, so nothing cancels. For ``a < 0`` it is ``1/z`` that is computed,
    with damp and drive exchanged; roots in the place of squares reach starts as small as
    the smallest number.

    Args:
        t: the time.
        rate: ``a``.
        damp: as above, of any sign.
        drive: as above, of any sign.
        speed: ``z'(0)``.
    """
    rises = rate >= 0
    a = jnp.abs(rate)
    damp, drive = jnp.where(rises, damp, drive), jnp.where(rises, drive, damp)
    speed = jnp.where(rises, speed, -speed)
    square = a**2 + (damp * drive) ** 2
    moves = square > 0
    k = jnp.sqrt(nonzero(square))
    up = jnp.where(moves, (k + a) / k, 1)
    root_down = jnp.where(moves, jnp.abs(damp) * jnp.abs(drive) / (k * jnp.sqrt(up)), 1)
    # The exponent has a floor, well above the numbers that are flushed to zero.
    end = -0.9 * jnp.log(jnp.finfo(k.dtype).tiny)
    root_decay = jnp.where(moves, jnp.exp(-jnp.minimum(k * t / 2, end)), 1)
    span = jnp.where(moves, -jnp.expm1(-k * t) / k, t)
    above = up + (root_down * root_decay) ** 2 + drive**2 * span
    size = jnp.maximum(jnp.maximum(root_decay, root_down), jnp.abs(damp) * jnp.sqrt(span))
    size = lax.stop_gradient(size)
    below = (
        (root_down / size) ** 2 + up * (root_decay / size) ** 2 + (damp / size) ** 2 * span
    )
    growth = jnp.sqrt(above / below) / size
    change = 2 * speed * span
    is_small = jnp.abs(change) < below * size**2 / 2
    safe = jnp.where(is_small, below * size**2, 1)
    small = jnp.log1p(jnp.where(is_small, change, 0) / safe) / 2
    return Boost(
        jnp.where(rises, growth, 1 / growth), jnp.where(rises, small, -small), is_small
    )
