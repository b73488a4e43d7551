from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._matrices import check_real
from ...._sharding import by_layer, placed_like
from ....linalg import increment, nonzero, polar, working_dtype
from ._layers import layer_norm


@checks_trees
def scale_by_lion_k(
    norm: Literal["l1", "l2", "nuclear"] | Callable[[Array], Array] = "l1",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
) -> optax.GradientTransformation:
    """Lion-κ: Lion for any convex function ``κ`` in place of the absolute value.

    ``U = ∇κ(b1 M + (1−b1) G)``, then ``M ← b2 M + (1−b2) G``. With weight decay ``λ`` it
    minimizes ``f(W)`` within the dual unit ball of radius ``1/λ``:

    - ``"l1"``: ``U = sign(…)``, Lion, ``max |W_ij| ≤ 1/λ``;
    - ``"l2"``: ``U = …/‖…‖``, ``‖W‖_F ≤ 1/λ``;
    - ``"nuclear"``: the polar factor, Muon with a weight bound, ``‖W‖₂ ≤ 1/λ``.

    Weights outside the ball approach it by a factor ``1 − ηλ`` a step.

    Args:
        norm: ``κ``, or its gradient as a function of a leaf.
        b1: weight of the momentum in the step.
        b2: decay of the momentum.

    Returns:
        The transform. Matrices are the last two axes of a leaf; for a vector the nuclear
        norm is the l2 norm.

    Raises:
        ValueError: for an unknown norm.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_lion_k("l2")
        >>> print(tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0])
        [0.6 0.8]

    Reference:
        L. Chen, B. Liu, K. Liang, Q. Liu, "Lion secretly solves constrained optimization:
        as Lyapunov predicts" (2023), arXiv 2310.05898. ``"l1"`` is
        ``optax.scale_by_lion``.
    """
    known = {"l1": jnp.sign, "l2": _unit, "nuclear": _polar}
    if not callable(norm) and norm not in known:
        raise ValueError(
            f"scale_by_lion_k takes norm 'l1', 'l2', 'nuclear' or a function, got {norm!r}."
        )
    gradient = norm if callable(norm) else known[norm]

    def init(params):
        check_real("scale_by_lion_k", params)
        zeros = lambda p: jnp.zeros_like(p, working_dtype(p.dtype))
        return optax.ScaleByLionState(
            count=jnp.zeros((), jnp.int32), mu=jax.tree.map(zeros, params)
        )

    def update(updates, state, params=None):
        del params
        step = lambda g, m: gradient(b1 * m + (1 - b1) * g).astype(g.dtype)
        decay = lambda g, m: (b2 * m + (1 - b2) * g).astype(m.dtype)
        new = optax.ScaleByLionState(
            count=increment(state.count),
            mu=jax.tree.map(decay, updates, state.mu),
        )
        return jax.tree.map(step, updates, state.mu), new

    return optax.GradientTransformation(init, update)


def _unit(x: Array) -> Array:
    norm = layer_norm(x)
    return x / nonzero(norm)


def _polar(x: Array) -> Array:
    if x.ndim < 2:
        return _unit(x)
    return placed_like(polar(by_layer(x), method="polar_express", precision=None), x)
