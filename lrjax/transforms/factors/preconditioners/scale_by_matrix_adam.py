from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int, PyTree

from ...._arguments import checks_trees
from ...._tree import check_alike, check_has_nodes, only_factors, put_factors
from ....linalg import (
    eigh,
    gram,
    identity_like,
    increment,
    nonzero,
    outer,
    times,
    together,
    working_dtype,
)
from ..._checks import check_non_negative


class ScaleByMatrixAdamState(NamedTuple):
    """The state of :func:`scale_by_matrix_adam`.

    Attributes:
        count: the number of steps.
        mu: running means of the normalized gradients, shaped like the factors.
        nu: ``(*b, r, r)`` for each factor, running means of ``GᵀG`` of one row.
    """

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


@checks_trees
def scale_by_matrix_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    conserve: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adam for factors with a matrix of second moments, so that no basis is preferred.

    For the gradient ``G (n, r)`` of each factor of a LowRank node, in step t from 1::

        V ← β2 V + (1 − β2) GᵀG / n          (r, r)
        U = G (V^½ + eps I)⁻¹
        M ← β1 M + (1 − β1) U                (n, r)

    and the update is ``M``: the momentum is taken after the normalization. The decays are
    bias-corrected by themselves, ``β_t = β (1 − βᵗ⁻¹)/(1 − βᵗ)``, so that the first step is
    ``√n`` times the polar factor of ``G``. Where Adam equalizes the entries, this
    equalizes directions: a rotation of the columns of ``G`` rotates the update. For
    ``r = 1`` it is an Adam with one second moment a factor. Leaves that are no LowRank
    nodes pass unchanged. State: that of a first moment, and ``r²`` numbers.

    As the ``phi`` of :func:`scale_by_gram` it sees gradients in an orthonormal frame of
    the partner. When the partner moves, the frame turns by ``P = Q_newᵀ Q_old``, which it
    is told as ``update(…, turn=…)``, and both moments go along::

        M ← M Pᵀ        V ← P V Pᵀ + (tr V − tr P V Pᵀ) E / tr E        E = I − P Pᵀ

    The last term gives the variance of the directions that leave the frame to those that
    enter it, of which nothing is known. Without it the trace of V falls whenever the frame
    moves and is made good only by the next ``1/(1 − β2)`` gradients, and the steps, which
    are divided by its root, are too long for as long.

    Args:
        b1: β1, in [0, 1).
        b2: β2, in [0, 1).
        eps: added to the root of the second moment; 0 is safe.
        conserve: whether the trace of V is conserved when the frame turns. LoRA-RITE by
            default does not.

    Returns:
        An optax transform.

    Raises:
        ValueError: at construction, for a negative argument; in ``init``, if the tree
            holds no LowRank node.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.ones((4, 1)), jnp.ones((1, 1)))
        >>> grad = lrjax.LowRank(jnp.full((4, 1), 0.01), jnp.full((1, 1), -5.0))
        >>> tx = lrjax.scale_by_matrix_adam()
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left.ravel().round(4), step.right.round(4))
        [1. 1. 1. 1.] [[-1.]]

    Reference:
        J.-N. Yen et al., "LoRA done RITE: robust invariant transformation equilibration
        for LoRA optimization" (2024), arXiv 2410.20625; the conserved trace is derived
        here, theirs grows a multiple of the identity. Special case: the first step is
        that of a polar factor.
    """
    for name, number in {"b1": b1, "b2": b2, "eps": eps}.items():
        check_non_negative("scale_by_matrix_adam", name, number)

    def init(params):
        check_has_nodes("scale_by_matrix_adam", params)
        factors = only_factors(params)
        like = lambda x, shape: jnp.zeros_like(x, working_dtype(x.dtype), shape=shape)
        mu = jax.tree.map(lambda x: like(x, x.shape), factors)
        nu = jax.tree.map(lambda x: gram(jnp.zeros_like(x)), factors)
        return ScaleByMatrixAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates, state, params=None, *, turn: Any = None, **extra):
        del extra
        if params is not None:
            check_alike(updates, params)
        count = increment(state.count)
        gradients, treedef = jax.tree.flatten(only_factors(updates))
        nothing = [None] * len(gradients)
        turns = nothing if turn is None else treedef.flatten_up_to(turn)
        turns = [p if eqx.is_array(p) else None for p in turns]  # of a frozen partner
        mu, nu = (treedef.flatten_up_to(tree) for tree in (state.mu, state.nu))
        gradients = [g.astype(m.dtype) for g, m in zip(gradients, mu, strict=True)]
        first, second = _decay(b1, count), _decay(b2, count)

        def average(decay: Array, old: Array, new: Array) -> Array:
            decay = decay.astype(old.dtype)
            return decay * old + (1 - decay) * new

        nu = [
            average(second, _turned(v, p, conserve), gram(g) / g.shape[-2])
            for v, p, g in zip(nu, turns, gradients, strict=True)
        ]
        inverses = together(lambda v: _inverse_root(v, eps), nu)
        mu = [
            average(first, m if p is None else outer(m, p), times(g, inverse))
            for m, p, g, inverse in zip(mu, turns, gradients, inverses, strict=True)
        ]
        state = ScaleByMatrixAdamState(count, treedef.unflatten(mu), treedef.unflatten(nu))
        moved = jax.tree.map(
            lambda m, u: m.astype(u.dtype), state.mu, only_factors(updates)
        )
        return put_factors(updates, moved), state

    return optax.GradientTransformationExtraArgs(init, update)


def _decay(b: ArrayLike, count: Int[Array, ""]) -> Array:
    """``b (1 − bᵗ⁻¹)/(1 − bᵗ)``: an average over the steps that there were."""
    b = jnp.asarray(b)
    before = b ** (count - 1)
    return b * (1 - before) / (1 - b * before)


def _turned(v: Array, turn: Array | None, conserve: bool) -> Array:
    if turn is None:
        return v
    moved = outer(times(turn, v), turn)
    if not conserve:
        return moved
    identity = identity_like(v)
    entering = identity - outer(turn, turn)
    trace = lambda x: jnp.sum(x * identity, axis=(-2, -1), keepdims=True)
    lost = jnp.maximum(trace(v) - trace(moved), 0)
    return moved + entering * (lost / nonzero(trace(entering)))


def _inverse_root(v: Array, eps: ArrayLike) -> Array:
    """``(V^½ + eps I)⁻¹``, of what is not below the rounding error of V; of zero, zero."""
    values, vectors = eigh(v)
    values = jnp.maximum(values, 0)
    floor = 8 * jnp.finfo(v.dtype).eps * jnp.sum(values, axis=-1, keepdims=True)
    size = jnp.sqrt(values + floor) + jnp.asarray(eps, v.dtype)
    inverse = jnp.where(size > 0, 1 / nonzero(size), 0)
    return outer(vectors * inverse[..., None, :], vectors)
