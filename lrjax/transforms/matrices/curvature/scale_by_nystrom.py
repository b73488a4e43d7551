from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._matrices import check_real
from ...._tree import check_params
from ....linalg import (
    LowRankPlusDiagonal,
    increment,
    nonzero,
    nystrom_sketch,
    working_dtype,
)


class ScaleByNystromState(NamedTuple):
    """The state of :func:`scale_by_nystrom`.

    Attributes:
        count: the number of steps.
        basis: ``U``, a tree like the parameters with one more axis of length ``r``.
        values: ``Λ (r,)``.
        damping: ``ρ``.
        rate: the learning rate that was measured.
    """

    count: Int[Array, ""]
    basis: PyTree
    values: Float[Array, " r"]
    damping: Float[Array, ""]
    rate: Float[Array, ""]


def hessian_product(value_fn: Callable, params: PyTree, vector: PyTree) -> PyTree:
    """``H v`` with the Hessian of ``value_fn(params)``."""
    return jax.jvp(jax.grad(value_fn), (params,), (vector,))[1]


@checks_trees
def scale_by_nystrom(
    rank: int = 10,
    damping: ArrayLike | None = None,
    *,
    refresh_every: int | Array = 100,
    rate_steps: int = 10,
    product: Callable[[Callable, PyTree, PyTree], PyTree] | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition by a low-rank sketch of the Hessian, and measure the learning rate.

    All parameters together are one vector. On every k-th step ``U Λ Uᵀ`` is the
    :func:`lrjax.linalg.nystrom_sketch` of the Hessian on a batch, and the update is
    ``η P⁻¹ g`` with::

        P = U Λ Uᵀ + ρI        η = 1 / (2 λ_max(P⁻¹ H))

    The largest eigenvalue is that of the Hessian on another batch, if there is one, by
    power iteration. A refresh takes ``r + 1`` products and those of the power iteration,
    of about two gradients each; the other steps take ``O(N r)``. The state has ``r``
    numbers a parameter. Leaves keep their sharding.

    Args:
        rank: ``r``, at most the number of parameters.
        damping: ``ρ``; None for ``λ_r``, the smallest eigenvalue that is kept, so that
            what was not kept has curvature one at most.
        refresh_every: ``k``; an epoch is a good one.
        rate_steps: of the power iteration. Zero: nothing is measured, and ``η = 1``.
        product: ``(value_fn, params, v) ↦ C v``, the products with the curvature; None for
            those of the Hessian. For a network those of the Gauss-Newton matrix have no
            negative eigenvalue.
        key: of the sketches; ``jax.random.key(0)`` by default.

    Returns:
        The transform; ``update(…, params, value_fn=…)`` needs the loss on a batch as a
        function of the parameters, at all steps, and takes ``rate_fn``, that on another
        batch. Products that are not finite leave the preconditioner as it was.

    Raises:
        ValueError: for a rank below one; in ``update``, without ``params`` or ``value_fn``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> loss = lambda x: 0.5 * jnp.sum(jnp.array([1e4, 1e2, 1.0]) * x**2)
        >>> tx = optax.chain(lrjax.scale_by_nystrom(2), optax.scale_by_learning_rate(1.0))
        >>> x = jnp.ones(3)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x, value_fn=loss))
        >>> state = tx.init(x)
        >>> for _ in range(10):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(jnp.abs(x[:2]).max() < 0.1)
        True

    Reference:
        Z. Frangella, P. Rathore, S. Zhao, M. Udell, "SketchySGD: reliable stochastic
        optimization via randomized curvature estimates" (2022), arXiv 2211.08597. Special
        case: at full rank half a step of damped Newton.
    """
    if rank < 1:
        raise ValueError(f"scale_by_nystrom needs rank >= 1, got {rank}.")
    product = hessian_product if product is None else product
    base = lambda: jr.key(0) if key is None else key

    def init(params):
        check_real("scale_by_nystrom", params)
        leaves, treedef = jax.tree.flatten(params)
        r = min(rank, sum(x.size for x in leaves))
        wide = jnp.result_type(jnp.float32, *(working_dtype(x.dtype) for x in leaves))
        zeros = [
            jnp.zeros((*x.shape, r), working_dtype(x.dtype))
            + jnp.zeros_like(x, working_dtype(x.dtype))[..., None]
            for x in leaves
        ]
        return ScaleByNystromState(
            jnp.zeros((), jnp.int32),
            treedef.unflatten(zeros),
            jnp.zeros(r, wide),
            jnp.ones((), wide),
            jnp.ones((), wide),
        )

    def update(updates, state, params=None, *, value_fn=None, rate_fn=None, **extra):
        del extra
        check_params("scale_by_nystrom", params)
        if value_fn is None:
            raise ValueError(
                "scale_by_nystrom needs the loss as a function of the parameters: call "
                "tx.update(grads, state, params, value_fn=lambda p: loss(p, batch))."
            )
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        g = [x.astype(working_dtype(x.dtype)) for x in leaves]
        points = treedef.flatten_up_to(params)
        refresh = lambda: _refresh(
            _on_leaves(product, value_fn, points, treedef),
            _on_leaves(product, rate_fn or value_fn, points, treedef),
            g,
            jr.fold_in(base(), state.count),
            state.values.shape[0],
        )
        old = (treedef.flatten_up_to(state.basis), *state[2:])

        def sketch():
            new = jax.tree.map(lambda x, y: x.astype(y.dtype), refresh(), old)
            finite = jnp.isfinite(sum(jnp.sum(x) for x in jax.tree.leaves(new)))
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        due = any_member(state.count % refresh_every == 0)
        basis, values, rho, rate = lax.cond(due, sketch, lambda: old)
        out = _operator(basis, values, rho).inverse().mv(g)
        out = [(rate * u).astype(x.dtype) for u, x in zip(out, leaves, strict=True)]
        return treedef.unflatten(out), ScaleByNystromState(
            increment(state.count), treedef.unflatten(basis), values, rho, rate
        )

    def _refresh(curvature, other, like, key, r):
        values, basis = nystrom_sketch(curvature, like, r, key=jr.fold_in(key, 0))
        floor = jnp.sqrt(jnp.finfo(values.dtype).eps) * values[0]
        rho = jnp.maximum(values[-1], floor) if damping is None else damping
        rho = nonzero(jnp.asarray(rho, values.dtype))
        if rate_steps == 0:
            return basis, values, rho, jnp.ones_like(rho)
        p = _operator(basis, values, rho)
        largest = _largest(other, p, like, jr.fold_in(key, 1), rate_steps)
        # Without curvature in sight the step is that of the preconditioner.
        rate = jnp.where(largest > 0, 0.5 / nonzero(largest), 1)
        return basis, values, rho, rate

    return optax.GradientTransformationExtraArgs(init, update)


def _operator(basis: list[Array], values: Array, rho: Array) -> LowRankPlusDiagonal:
    return LowRankPlusDiagonal(basis, values, rho, orthonormal=True)


def _on_leaves(product, value_fn, points: list[Array], treedef) -> Callable:
    """Products on lists of leaves, in their working dtype."""
    params = treedef.unflatten(points)

    def times(x: list[Array]) -> list[Array]:
        given = [y.astype(p.dtype) for y, p in zip(x, points, strict=True)]
        found = product(value_fn, params, treedef.unflatten(given))
        pairs = zip(treedef.flatten_up_to(found), x, strict=True)
        return [y.astype(z.dtype) for y, z in pairs]

    return times


def _largest(curvature, p: LowRankPlusDiagonal, like, key, steps: int) -> Array:
    """The eigenvalue of ``P⁻¹ C`` of the largest size, by power iteration."""
    inverse = p.inverse()
    zero = jnp.zeros((), p.values.dtype)
    dot = lambda x, y: sum((jnp.sum(a * b) for a, b in zip(x, y, strict=True)), zero)
    as_like = lambda v: [x.astype(y.dtype) for x, y in zip(v, like, strict=True)]
    start = [
        jr.normal(jr.fold_in(key, i), x.shape, x.dtype) + jnp.zeros_like(x)
        for i, x in enumerate(like)
    ]

    def step(_, carry):
        v, _ = carry
        size = nonzero(jnp.sqrt(dot(v, v)))
        v = as_like([x / size for x in v])
        image = curvature(v)
        value = jnp.abs(dot(v, image)) / nonzero(dot(v, p.mv(v)))
        return as_like(inverse.mv(image)), value

    return lax.fori_loop(0, steps, step, (start, zero))[1]
