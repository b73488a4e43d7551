from typing import Any

import optax
from equinox import is_array_like
from jax import lax
from jaxtyping import Array

from ...._arguments import checks_trees
from ...._moments import check_moments_known, map_moments
from ....linalg import times
from ....lowrank import LowRank, SVDForm, project_to_tangent, retraction, transport
from ._nodes import (
    NodeTree,
    aligned,
    check_forms,
    difference,
    in_use,
    tree_of,
)


@checks_trees
def riemannian(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Move matrices of a fixed rank along their manifold, with momentum that follows.

    For a node ``W = U S Vᵀ`` of width ``r`` with the full gradient ``G`` never formed:
    ``inner`` sees the tangent ``P(G) = A Vᵀ + U Bᵀ`` as one array ``(m + n, r)``, ``A`` on
    top of ``B``, and what it makes of it is the step: ``W ← SVD_r(W + A Vᵀ + U Bᵀ)``, the
    metric projection. Its first moments are tangents too, and are projected on the tangent
    space at the new point. Weight decay acts on ``W``, which is a tangent at itself.

    None of it depends on how ``W`` is factored. ``O((m + n) r²)`` and an SVD of a
    ``2r × 2r`` matrix.

    Args:
        inner: an optimizer with its learning rate, linear in the gradient:
            ``optax.sgd(rate, momentum)`` and what is put around it. It also trains the
            leaves that are no nodes.

    Returns:
        An optax transform around the inner one, the last of a chain.

    Raises:
        ValueError: at ``init``, for LowRank nodes without an SVDForm, for a node wider than
            its matrix, or for an inner transform with second moments, which are no
            tangents; at ``update``, without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 0.0, 0.0]))
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2
        >>> x = lrjax.svd(lrjax.LowRank(jnp.eye(4)[:, 1:3] + 1, jnp.eye(4)[:, :2]))
        >>> tx = lrjax.riemannian(optax.sgd(0.3, 0.5))
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state = tx.init(x)
        >>> for _ in range(30):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < 1e-3)
        True

    Reference:
        B. Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013),
        arXiv 1209.3834, with the transport of its conjugate gradients. Special case:
        without momentum, :func:`dynamical_low_rank` in parallel at full width.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        check_forms("riemannian", params)
        tree = NodeTree.of(params)
        state = inner.init(
            tree.with_leaves({i: _at_itself(tree.leaves[i]) for i in tree.places})
        )
        if tree.places:
            check_moments_known(state)
            map_moments(_check_linear, state)
        return state

    def update(updates, state, params=None, **extra):
        tree = tree_of("riemannian", params, updates)
        grads = tree.like(updates)
        old = {i: in_use(tree.leaves[i], None) for i in tree.places}
        for i, x in old.items():
            grads[i] = _joined(project_to_tangent(x, grads[i]))
        points = None
        if params is not None:
            points = tree.with_leaves({i: _at_itself(x) for i, x in old.items()})
        steps, state = inner.update(tree.treedef.unflatten(grads), state, points, **extra)
        steps, new = tree.like(steps), {}
        for i, x in old.items():
            new[i] = aligned(retraction(x, _parted(steps[i], x)), x)
            steps[i] = difference(new[i], tree.leaves[i])

        def carried(moments: Any, signed: bool) -> Any:
            leaves = tree.like(moments)
            for i, x in old.items():
                if is_array_like(leaves[i]):  # not masked out
                    moved = transport(x, _parted(leaves[i], x), new[i])
                    leaves[i] = _joined(moved).astype(leaves[i].dtype)
            return tree.treedef.unflatten(leaves)

        return tree.treedef.unflatten(steps), map_moments(carried, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _at_itself(x: SVDForm) -> Array:
    """The tangent ``(½ U S, ½ V Sᵀ)`` that is the matrix itself."""
    x = in_use(x, None)
    return _joined(LowRank(0.5 * times(x.left, x.core), 0.5 * times(x.right, x.core.mT)))


def _joined(step: LowRank) -> Array:
    """``(A, B)`` as one array ``(*batch, m + n, r)``, a leaf for a leaf."""
    return lax.concatenate([step.left, step.right], step.left.ndim - 2)


def _parted(step: Array, x: SVDForm) -> LowRank:
    m = x.left.shape[-2]
    step = step.astype(x.dtype)
    return LowRank(step[..., :m, :], step[..., m:, :])


def _check_linear(moments: Any, signed: bool) -> Any:
    if not signed:
        raise ValueError(
            "riemannian needs an inner transform that is linear in the gradient: second "
            "moments, as those of Adam, are no tangents that could move along. Take "
            "optax.sgd(rate, momentum), or lrjax.dynamical_low_rank(optax.adam(rate))."
        )
    return moments
