# ruff: noqa: D102 - what overrides a method of the base class is documented there
import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


GROSS = 200.0  # a measurement so many times the lower quartile is gross
SAMPLES = 256  # of which the quartile is taken


class Objective(eqx.Module):
    """A convex function of the residuals ``r = A(X) − y``, summed over measurements.

    An objective of your own needs no more than ``pointwise``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> class LogCosh(lrjax.recovery.Objective):
        ...     def pointwise(self, r):
        ...         return jnp.log(jnp.cosh(r))
        >>> print(LogCosh().subgradient(jnp.array([-9.0, 0.0, 9.0])).round(3))
        [-1.  0.  1.]
    """

    @abc.abstractmethod
    def pointwise(self, r: Float[Array, "*m"]) -> Float[Array, "*m"]:
        """The loss of each residual."""

    def subgradient(self, r: Float[Array, "*m"]) -> Float[Array, "*m"]:
        """A subgradient at each residual: what differentiating the loss gives."""
        return jax.grad(self)(r)

    def __call__(self, r: Float[Array, "*m"]) -> Float[Array, ""]:
        """The summed loss."""
        return jnp.sum(self.pointwise(r))

    def between(
        self, measured: Float[Array, "*m"], targets: Float[Array, "*m"]
    ) -> Float[Array, ""]:
        """The summed loss of ``measured − targets``, less a constant of the targets.

        Where a loss is linear, far from zero, a gross target adds its own size to the sum,
        whatever is measured: a few of a million times the size of the others, and in
        float32 the sum no longer tells one matrix from the next. What a target adds
        beyond 200 lower quartiles of ``|targets|`` is left out, before it is rounded. The
        constant is zero without such targets; the derivative is that of the whole sum.
        """
        reach = self._linear_from()
        if reach is None:
            return self(measured - targets)
        limit = reach + GROSS * _lower_quartile(jnp.abs(targets))
        near = jnp.clip(targets, -limit, limit)
        gross = jnp.abs(targets) > limit
        # On one side of both the targets differ by a constant; else it is subtracted.
        aside = gross & (jnp.abs(measured) <= limit - reach)
        values = self.pointwise(measured - jnp.where(aside, near, targets))
        excess = self.pointwise(-targets) - self.pointwise(-near)
        return jnp.sum(values - jnp.where(gross & ~aside, excess, 0))

    def _linear_from(self) -> ArrayLike | None:
        """The size of a residual from which on the loss is linear; ``None``: nowhere."""
        return None


def _lower_quartile(sizes: Array) -> Array:
    """Of some of the sizes, evenly spaced; those that are zero do not count."""
    flat = sizes.reshape(-1)
    some = flat[:: max(1, flat.size // SAMPLES)]
    return jnp.nanquantile(jnp.where(some > 0, some, jnp.nan), 0.25)


class L1(Objective):
    """The sum of absolute residuals; its subgradient at zero is zero.

    Robust: an outlier pulls no harder than any other measurement. Sharp: it grows
    linearly around an exact solution, so subgradient methods converge linearly.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.recovery.L1()(jnp.array([-2.0, 0.5])))
        2.5
    """

    def pointwise(self, r):
        return jnp.abs(r)

    def subgradient(self, r):
        return jnp.sign(r)  # differentiation takes one of the two slopes at zero

    def _linear_from(self):
        return 0.0


class Squared(Objective):
    """Half the sum of squared residuals.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.recovery.Squared()(jnp.array([-2.0, 1.0])))
        2.5
    """

    def pointwise(self, r):
        return 0.5 * r * r


class Huber(Objective):
    """Quadratic for ``|r| <= width``, linear with slope ``width`` beyond.

    Attributes:
        width: in the units of the measurements; about the size of the dense noise.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.recovery.Huber(1.0)(jnp.array([3.0, 0.5])))
        2.625
    """

    width: ArrayLike

    def pointwise(self, r):
        width = jnp.asarray(self.width)
        clipped = jnp.clip(r, -width, width)
        return clipped * (r - 0.5 * clipped)

    def _linear_from(self):
        return self.width


class Quantile(Objective):
    """The pinball loss ``max(level · r, (level − 1) · r)`` of ``r = A(X) − y``.

    ``level = 0.5`` is half the l1 loss. Otherwise X is fitted so that a share ``1 −
    level`` of the measurements lies above it.

    Attributes:
        level: in ``(0, 1)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.recovery.Quantile(0.25)(jnp.array([4.0, -4.0])))
        4.0
    """

    level: ArrayLike

    def pointwise(self, r):
        slope = jnp.where(r > 0, self.level, self.level - 1)
        # Of all subgradients at zero the one that moves nothing.
        return r * jnp.where(r == 0, 0, slope).astype(r.dtype)

    def _linear_from(self):
        return 0.0
