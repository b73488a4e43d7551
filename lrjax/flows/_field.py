from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from ..linalg import nonzero


class _Scales(NamedTuple):
    """What the stopping rules measure against."""

    loss: Scalar
    gradient: Scalar


class Position(NamedTuple):
    """What is integrated. ``velocity`` is ``None`` without friction."""

    params: PyTree
    velocity: PyTree | None


class FlowState:
    """The state of a flow at one time, as ``until=`` and ``observe=`` see it.

    What ``observe=`` of :func:`lrjax.solve` sees, :class:`lrjax.recovery.SolveState`, has
    ``t``, ``params`` and ``loss`` too: one function can watch both.

    Every attribute is computed when it is read, so that rules which look at the loss
    alone do not pay for a gradient.

    Attributes:
        t: the time.
        params: the parameters, in the structure they were given in.
    """

    def __init__(self, t, position, data, field):
        self.t = t
        self.params = eqx.combine(position.params, field.fixed)
        self._position, self._data, self._field = position, data, field

    @property
    def loss(self) -> Scalar:
        """The loss."""
        return self._field.value(self._position.params, self._data[0])

    @property
    def start_loss(self) -> Scalar:
        """The loss at the start."""
        return self._data[1].loss

    @property
    def gradient(self) -> PyTree:
        """The gradient of the loss, before the preconditioner."""
        return self._field.value_and_grad(self._position.params, self._data[0])[1]

    @property
    def gradient_norm(self) -> Scalar:
        """The Euclidean norm of the gradient."""
        return tree_norm(self.gradient)

    @property
    def start_gradient_norm(self) -> Scalar:
        """The norm of the gradient at the start."""
        return self._data[1].gradient

    @property
    def size(self) -> Scalar:
        """The Euclidean norm of the parameters that flow."""
        return tree_norm(self._position.params)

    @property
    def speed(self) -> Scalar:
        """The Euclidean norm of ``dθ/dt``."""
        return tree_norm(self._field(self.t, self._position, self._data).params)


class Field(eqx.Module):
    """The right-hand side of a flow. A module, so that equal fields compile once."""

    loss: Callable[..., Scalar]
    precondition: optax.GradientTransformation | None
    friction: Any
    fixed: PyTree

    def __call__(self, t, position: Position, data) -> Position:
        descent = self._descent(position.params, data[0])
        if self.friction is None:
            return Position(descent, None)
        rate = self.friction(t) if callable(self.friction) else self.friction
        velocity = position.velocity
        acceleration = jax.tree.map(
            lambda d, v: d - jnp.asarray(rate, v.dtype) * v, descent, velocity
        )
        return Position(velocity, acceleration)

    def value(self, moving: PyTree, args) -> Scalar:
        return self.loss(eqx.combine(moving, self.fixed), *args)

    def value_and_grad(self, moving: PyTree, args) -> tuple[Scalar, PyTree]:
        return jax.value_and_grad(self.value)(moving, args)

    def _descent(self, moving: PyTree, args) -> PyTree:
        value, grad = self.value_and_grad(moving, args)
        updates = grad
        if self.precondition is not None:
            tx = optax.with_extra_args_support(self.precondition)
            updates, _ = tx.update(grad, tx.init(moving), moving, value=value, grad=grad)
        return jax.tree.map(jnp.negative, updates)

    def start(self, moving: PyTree) -> Position:
        at_rest = None if self.friction is None else jax.tree.map(jnp.zeros_like, moving)
        return Position(moving, at_rest)

    def scales(self, moving: PyTree, args) -> _Scales:
        value, grad = self.value_and_grad(moving, args)
        return _Scales(value, tree_norm(grad))

    def state(self, t, position: Position, data) -> FlowState:
        return FlowState(t, position, data, self)


def tree_norm(tree: PyTree) -> Array:
    """The Euclidean norm of a tree, without overflow of the squares."""
    leaves = jax.tree.leaves(tree)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
    unit = nonzero(largest)
    return unit * jnp.sqrt(sum(jnp.sum((x / unit) ** 2) for x in leaves))


# Modules instead of closures: two of them that hold the same functions are equal, so
# that a second call with other numbers finds the compiled program of the first.


class Params(eqx.Module):
    """What ``SaveAt`` saves: the parameters."""

    def __call__(self, t, position: Position, data) -> PyTree:
        del t, data
        return position.params


class Observed(eqx.Module):
    """What ``SaveAt`` saves: the answer of ``observe``."""

    observe: Callable[[FlowState], PyTree]
    field: Field

    def __call__(self, t, position: Position, data) -> PyTree:
        return self.observe(self.field.state(t, position, data))


class Occurred(eqx.Module):
    """The condition of an ``Event``: the answer of ``until``."""

    until: Callable[[FlowState], Any]
    field: Field

    def __call__(self, t, position: Position, data, **unused) -> Array:
        del unused
        return jnp.asarray(self.until(self.field.state(t, position, data)), bool)
