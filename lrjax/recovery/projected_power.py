"""The power method with a projection onto what a vector is known to be."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..linalg import nonzero
from ._inputs import check_not_negative


class PowerSolution(eqx.Module):
    """What :func:`projected_power` found.

    Attributes:
        vector: ``(n,)`` of length one, in the set.
        value: ``vᵀ M v``.
        residual: how far the last step moved it.
        steps: steps taken.
        converged: whether that is within the tolerance.
    """

    vector: Float[Array, " n"]
    value: Float[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


def projected_power(
    matvec: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    project: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    start: Float[Array, " n"],
    *,
    shift: ArrayLike = 0.0,
    tol: ArrayLike = 1e-5,
    max_steps: int = 100,
) -> PowerSolution:
    """The leading eigenvector of a symmetric matrix, within a set.

    ``v ← P(M v + shift · v)``, scaled to length one. With the identity for P it is the
    power method. With the projection onto the range of a generative model it finds a spike
    that principal components lose in the noise, where the model knows what spikes look
    like; with ``jax.nn.relu`` a non-negative one, with a threshold a sparse one.

    Args:
        matvec: the product with M.
        project: onto the set, from vectors of any length; the result is scaled to length
            one. :class:`NearestInRange` for a generative model.
        start: ``(n,)``, not orthogonal to what is looked for: the column of a covariance
            with the largest diagonal entry, say. A set that is not convex has several ends:
            ``vmap`` over starts, and keep the one of the largest ``value``.
        shift: makes the matrix positive, so that the value rises in every step if the
            projection is exact.
        tol: stop when a step is shorter.
        max_steps: at most so many.

    Returns:
        A :class:`PowerSolution`; under ``jit`` and ``vmap``.

    Raises:
        ValueError: for a negative ``tol``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> m = jnp.array([[2.0, -1.0], [-1.0, 1.0]])
        >>> power = lrjax.recovery.projected_power
        >>> found = power(lambda v: m @ v, jax.nn.relu, jnp.ones(2))
        >>> print(found.vector, found.value)
        [1. 0.] 2.0

    Reference:
        Z. Liu, J. Liu, S. Ghosh, J. Han, J. Scarlett, "Generative principal component
        analysis" (2022), arXiv 2203.09693.
    """
    check_not_negative("projected_power", tol=tol)
    unit = lambda x: x / nonzero(jnp.linalg.norm(x))

    def step(state):
        v, _, k = state
        new = unit(project(unit(matvec(v) + shift * v)))
        return new, jnp.linalg.norm(new - v), k + 1

    def going(state):
        _, moved, k = state
        return (k < max_steps) & (moved > tol)

    v = unit(start)
    first = v, jnp.full((), jnp.inf, v.dtype), jnp.zeros((), int)
    v, moved, steps = lax.while_loop(going, step, first)
    return PowerSolution(v, v @ matvec(v), moved, steps, moved <= tol)


class NearestInRange(eqx.Module):
    """The projection of a vector onto the directions that a generative model makes.

    ``max_z ⟨x, G(z)⟩/‖G(z)‖`` over latent vectors z by L-BFGS, from several starts of which
    the best counts; the result has length one. The range of a network is not convex, and
    this need not be the nearest point of it: more starts come closer.

    Attributes:
        generator: G, from ``(k,)`` to ``(n,)``.
        starts: ``(s, k)``, latent vectors to start from.
        steps: of L-BFGS.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> plane = jnp.eye(3)[:, :2]
        >>> nearest = lrjax.recovery.NearestInRange(lambda z: plane @ z, jnp.eye(2), 20)
        >>> print(nearest(jnp.array([3.0, 4.0, 5.0])).round(3))
        [0.6 0.8 0. ]
    """

    generator: Callable[[Array], Array]
    starts: Float[Array, "s k"]
    steps: int = eqx.field(static=True, default=30)

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """The direction nearest to x that was found."""

        def direction(z: Array) -> Array:
            made = self.generator(z)
            return made / nonzero(jnp.linalg.norm(made))

        objective = lambda z: -jnp.sum(x * direction(z)) / nonzero(jnp.linalg.norm(x))

        def descended(z: Array) -> tuple[Array, Array]:
            solver = optax.lbfgs()
            value_and_grad = optax.value_and_grad_from_state(objective)

            def step(carry, _):
                z, state = carry
                value, grad = value_and_grad(z, state=state)
                updates, state = solver.update(
                    grad, state, z, value=value, grad=grad, value_fn=objective
                )
                return (jnp.asarray(optax.apply_updates(z, updates)), state), None

            (z, _), _ = lax.scan(step, (z, solver.init(z)), length=self.steps)
            return z, objective(z)

        found, values = jax.vmap(descended)(self.starts)
        return direction(found[jnp.argmin(values)])
