from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, ArrayLike, Float

from ...._arguments import checks_trees
from ...._matrices import Where, choose, map_matrices
from ...._sharding import placed_like
from ...._tree import check_params
from ....linalg import nonzero, outer, polar, products_at, truncated_svd, working_dtype
from ..._checks import check_non_negative
from ._layers import layer_norm


class FrankWolfeState(NamedTuple):
    """The state of :func:`frank_wolfe`.

    Attributes:
        gap: ``⟨G, W − S⟩`` of the last step, summed over the matrices.
    """

    gap: Float[Array, ""]


@checks_trees
def frank_wolfe(
    lmo: Literal["spectral", "nuclear", "frobenius"] | Callable[[Array], Array],
    radius: ArrayLike = 1.0,
    *,
    where: Where | None = None,
) -> optax.GradientTransformation:
    """The Frank-Wolfe direction: toward the best point of a norm ball, without projection.

    With ``V = argmax ⟨G, V⟩`` over the unit ball of a norm and ``S = −radius · V``, the
    point of the ball at which the linear model of the loss is smallest::

        P = W − S

    to be stepped along by a learning rate γ, ``W ← (1 − γ) W + γ S``: a convex combination,
    so that for ``γ ∈ [0, 1]`` weights stay in the ball ``‖W‖ ≤ radius``. The norm, and V
    for ``G = U diag(σ) Vᵀ``:

    - ``"spectral"``: the polar factor ``U Vᵀ``. With ``γ = η λ`` and ``radius = 1/λ`` it is
      Muon with learning rate η and decoupled weight decay λ;
    - ``"nuclear"``: the leading pair ``u vᵀ``. Each step adds one to the rank at most, so
      that t steps from zero end at a matrix of rank t;
    - ``"frobenius"``: ``G / ‖G‖_F``, the normalized gradient.

    Step rules are learning rates: ``lambda t: 2 / (t + 2)``, with which a convex loss of
    curvature L comes to ``2 L d² / (t + 2)`` of its minimum in a ball of diameter d, at
    any scale of the loss; a constant, with momentum before it; or
    ``lrjax.scale_by_polyak`` behind it, for a known minimum.

    The gap ``⟨G, P⟩`` is in the state. Of a convex loss and its own gradient it is an upper
    bound of ``loss(W) − min``, and zero at the minimum alone; with momentum or batches it
    is that of what comes in. ``"nuclear"`` finds u and v by power iterations: the gap is
    that of the point it found.

    Args:
        lmo: a norm, or a function from matrices ``(*b, m, n)`` to the points V of the unit
            ball, ``functools.partial(lrjax.linalg.polar, method="muon")`` for one.
        radius: of the ball, that of each matrix.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat; leading axes are a stack of matrices, each in its own ball. By
            default matrices but embeddings and heads. The others pass unchanged.

    Returns:
        An optax transform; ``update`` needs ``params``. Where the gradient is zero, so is
        V, and the weight decays.

    Raises:
        ValueError: for another norm, or a negative radius; in ``init``, if ``where``
            chooses no leaf, or one that is no matrix; in ``update``, without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 1.0]))
        >>> loss = lambda w: jnp.sum((w - target) ** 2) / 2
        >>> tx = optax.chain(
        ...     lrjax.frank_wolfe("nuclear", 2.0, where=lambda path, shape: True),
        ...     optax.scale_by_learning_rate(lambda t: 2 / (t + 2)),
        ... )
        >>> w = jnp.zeros((2, 2))
        >>> state = tx.init(w)
        >>> for _ in range(3):
        ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> print(w.round(3) + 0.0, state[0].gap.round(3))
        [[2. 0.]
         [0. 0.]] 0.0

    Reference:
        M. Jaggi, "Revisiting Frank-Wolfe: projection-free sparse convex optimization"
        (2013), ICML; of layers of networks: T. Pethick et al., "Training deep learning
        models with norm-constrained LMOs" (2025), arXiv 2502.07529. Special case: the
        spectral ball is :func:`lrjax.orthogonalize_updates` before
        ``optax.add_decayed_weights``.
    """
    check_non_negative("frank_wolfe", "radius", radius)
    if not callable(lmo) and lmo not in _ORACLES:
        raise ValueError(
            f"frank_wolfe takes lmo 'spectral', 'nuclear', 'frobenius' or a function, got "
            f"{lmo!r}."
        )
    oracle = lmo if callable(lmo) else _ORACLES[lmo]

    def init(params):
        choose("frank_wolfe", params, where)
        return FrankWolfeState(jnp.zeros([], _gap_dtype(params)))

    def update(updates, state, params=None):
        check_params("frank_wolfe", params)

        def one(leaf, g, w):
            a = leaf.view(g)
            a, w = (x.astype(working_dtype(g.dtype)) for x in (a, leaf.view(w)))
            with products_at(None, g.dtype):
                vertex = placed_like(oracle(a), a)
            direction = placed_like(w, a) + radius * vertex
            gap = jnp.sum(a * direction).astype(state.gap.dtype)
            return leaf.restore(direction.astype(g.dtype), g), gap

        others = lambda g, w: (g, None)
        new, gaps = map_matrices(
            "frank_wolfe", where, one, updates, params, rest=others, results=2
        )
        gap = sum(jax.tree.leaves(gaps), start=jnp.zeros_like(state.gap))
        return new, FrankWolfeState(gap)

    return optax.GradientTransformation(init, update)


def _spectral(g: Array) -> Array:
    return polar(g, method="polar_express", precision=None)


def _nuclear(g: Array) -> Array:
    # A few columns more than one: what matters is the gap behind them all.
    top = truncated_svd(g, 1, method="randomized", key=jr.key(0), power_iters=4)
    return outer(jnp.where(top.values[..., None, :] > 0, top.left, 0), top.right)


def _frobenius(g: Array) -> Array:
    largest = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
    g = g / nonzero(largest)  # whose squares neither overflow nor vanish
    return g / nonzero(layer_norm(g))


_ORACLES = {"spectral": _spectral, "nuclear": _nuclear, "frobenius": _frobenius}


def _gap_dtype(params: Any) -> jnp.dtype:
    dtypes = [x.dtype for x in jax.tree.leaves(params) if hasattr(x, "dtype")]
    return jnp.result_type(jnp.float32, *dtypes)
