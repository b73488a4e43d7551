from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar


def surrogate_steps(
    loss: Callable[..., Scalar],
    target: Callable[..., PyTree],
    params: PyTree,
    state: Any,
    *args: Any,
    tx: optax.GradientTransformation,
    step_size: ArrayLike,
    steps: int,
) -> tuple[PyTree, Any, Float[Array, ""]]:
    """Take several steps with one gradient of the loss, on a model of it in its inputs.

    The loss is one of ``z = target(θ)``, logits for instance, or a matrix in factors. At
    ``z_t = target(θ_t)`` its gradient is taken once, and an optimizer takes its steps on::

        g(θ) = ⟨∇loss(z_t), z(θ) − z_t⟩ + ‖z(θ) − z_t‖² / (2 η)

    Where the curvature of the loss in z is at most ``1/η``, ``loss(z_t) + g`` lies above it
    and touches it at θ_t: what lowers g lowers the loss at least as much. One step is the
    plain step of the optimizer, whatever η. It pays where the loss costs more than the
    target: labels that are simulated or asked for, an adversary, other devices.

    Args:
        loss: ``loss(z, *args)``.
        target: ``target(params, *args)``, a tree of arrays.
        params: θ_t, a tree of floating-point arrays.
        state: that of ``tx``, from ``tx.init(params)`` or the call before.
        *args: data of the loss and the target.
        tx: the optimizer of the steps; its ``update`` is told ``value = loss(z_t) + g``,
            and ``grad``.
        step_size: η, a step in z.
        steps: how many.

    Returns:
        The parameters, the state of ``tx``, and ``loss(z_t)``.

    Raises:
        ValueError: for less than one step.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> x = jnp.linspace(-1.0, 1.0, 20).reshape(5, 4) ** 2
        >>> y = jnp.arange(5.0)
        >>> loss = lambda z, x, y: jnp.sum(jnp.abs(z - y) ** 1.5)
        >>> target = lambda w, x, y: x @ w
        >>> w, tx = jnp.zeros(4), optax.sgd(0.05)
        >>> step = jax.jit(lambda w, state: lrjax.transforms.surrogate_steps(
        ...     loss, target, w, state, x, y, tx=tx, step_size=0.5, steps=10))
        >>> state = tx.init(w)
        >>> for _ in range(50):
        ...     w, state, value = step(w, state)
        >>> print(value < 0.4 * loss(jnp.zeros(5), x, y))
        True

    Reference:
        J. W. Lavington, S. Vaswani, R. Babanezhad, M. Schmidt, N. Le Roux, "Target-based
        surrogates for stochastic optimization" (2023), arXiv 2302.02607. Special cases: one
        step is that of ``tx``; for ``z = X θ`` the minimum of g is the step ``η (XᵀX)⁻¹Xᵀ
        ∇loss``; for ``z = left rightᵀ`` its minimum in one factor is the step of
        :func:`lrjax.scale_by_gram` with ``order="alternating"``.
    """
    if steps < 1:
        raise ValueError(f"surrogate_steps needs at least one step, got steps={steps}.")
    optimizer = optax.with_extra_args_support(tx)
    start, pull_back = jax.vjp(lambda params: target(params, *args), params)
    value, slope = jax.value_and_grad(lambda z: loss(z, *args))(start)

    def move(params: PyTree, state: Any, height: Array, grad: PyTree) -> tuple[PyTree, Any]:
        updates, state = optimizer.update(grad, state, params, value=height, grad=grad)
        return optax.apply_updates(params, updates), state

    def model(params: PyTree) -> Array:
        away = jax.tree.map(jnp.subtract, target(params, *args), start)
        linear = optax.tree.vdot(slope, away)
        return value + linear + optax.tree.vdot(away, away) / (2 * step_size)

    def step(carry: tuple[PyTree, Any], _: None) -> tuple[tuple[PyTree, Any], None]:
        params, state = carry
        return move(params, state, *jax.value_and_grad(model)(params)), None

    # The first step is at z_t itself, where rounding must not be divided by a small η.
    carry = move(params, state, value, *pull_back(slope))
    if steps > 1:
        carry, _ = lax.scan(step, carry, length=steps - 1)
    return *carry, value
