from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Int, PyTree

from ...._arguments import checks_trees
from ...._batching import any_member
from ...._moments import check_moments_known
from ....linalg import increment
from ..._checks import check_non_negative
from ._low_rank_step import LowRankStep
from ._nodes import NodeTree, check_forms, columns_used, in_use, is_form, is_whole, tree_of


Method = Literal["parallel", "augmented", "kls"]


class DynamicalLowRankState(NamedTuple):
    """The state of :func:`dynamical_low_rank`.

    Attributes:
        count: the number of steps.
        rank: of each node the columns in use, ``(*batch,)``; of a tensor ``(*batch, d)``.
        inner: the state of the optimizer of cores and other leaves.
    """

    count: Int[Array, ""]
    rank: PyTree
    inner: Any


@checks_trees
def dynamical_low_rank(
    inner: optax.GradientTransformation,
    tol: ArrayLike = 0.0,
    *,
    method: Method = "parallel",
    every: int | Array = 1,
    project: Callable[[Any], Any] | None = None,
    moments: Literal["rotate", "reset"] = "rotate",
) -> optax.GradientTransformationExtraArgs:
    """Train matrices ``U S Vᵀ`` in bases that follow the gradient, with ranks that adapt.

    A step at ``W = U S Vᵀ`` of rank ``r``, with the full gradient ``G`` never formed:

    1. augment: ``Û = orth[U | G V]``, ``V̂ = orth[V | Gᵀ U]`` of width ``2 r``, and ``Ŝ =
       (Ûᵀ U) S (V̂ᵀ V)ᵀ``, the same value;
    2. one step of ``inner`` on the small core ``Ŝ``, and on all leaves that are no nodes;
    3. truncate: an SVD of ``Ŝ``, of which the smallest rank is kept whose tail has a norm
       of at most ``tol`` times that of all, and at most the width of the node.

    The three methods differ in the gradient of the wide core:

    - ``"parallel"``: ``Ûᵀ P(G) V̂`` with the tangent projection ``P(G) = U Uᵀ G + G V Vᵀ −
      U Uᵀ G V Vᵀ``, from the one gradient that there is. For plain steps of length η the
      result is the truncation of ``W − η P(G)``.
    - ``"kls"``: ``Ûᵀ G V̂``, for which ``update`` takes ``value_and_grad_fn=f`` with
      ``f(params) -> (value, grads)``, and calls it once, on a tree with wide nodes.
    - ``"augmented"``: bases stay wide for ``every`` steps, in all of which the core moves;
      in the first as in ``"parallel"``, then by its own gradient. Here the width of a node
      is that of the wide bases, so that the rank may grow to half of it.

    The core of a tensor in Tucker form, :class:`lrjax.lowrank.TuckerForm`, gets wider bases
    on every axis, by :func:`lrjax.lowrank.tucker_tangent`, and is truncated axis by axis,
    by :func:`lrjax.lowrank.tucker_truncate`: convolutions, with a rank for each axis.

    No step depends on how small a singular value is, so that spectra that decay, as all do
    in training, do not make the problem stiff. The width of a node is static and its rank
    is an integer in the state: columns out of use are zeros of the core, one program serves
    all ranks, and ``vmap`` over ``tol`` works. The cost is ``O((m + n) r²)`` and an SVD of
    a ``2r × 2r`` matrix.

    Args:
        inner: an optimizer with its learning rate; it sees the core in place of each node,
            so that weight decay and clipping never touch the bases.
        tol: the relative tail that is cut, a number of at least zero; zero for a rank that
            only the width limits.
        method: as above.
        every: the period in which bases move. In the steps between them the core moves in
            the bases there are.
        project: what is done to a node after truncation, such as
            :func:`lrjax.lowrank.clamp_spectrum`.
        moments: what becomes of the inner moments of the core when the bases change, see
            :func:`lrjax.lowrank.transport_core`. ``"reset"`` forgets the first, so that
            momentum builds up anew in every period, and keeps the mean of the second.

    Returns:
        An optax transform around the inner one, the last of a chain.

    Raises:
        ValueError: for an unknown method; at ``init``, for LowRank nodes without an
            SVDForm, for a node wider than its matrix (or than the other axes of a tensor
            allow), or for inner moments that nothing is known of; at ``update``, without
            ``params``, or for ``"kls"`` without ``value_and_grad_fn``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 0.0, 0.0]))
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2
        >>> x = lrjax.svd(jnp.ones((4, 4)) + jnp.eye(4))  # of full rank
        >>> tx = lrjax.dynamical_low_rank(optax.sgd(0.5), tol=0.01)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state = tx.init(x)
        >>> for _ in range(20):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < 1e-3, state.rank)
        True 2

    Reference:
        S. Schotthöfer, E. Zangrando, J. Kusch, G. Ceruti, F. Tudisco, "Low-rank lottery
        tickets: finding efficient low-rank neural networks via matrix differential
        equations" (2022), arXiv 2205.13571; in parallel: G. Ceruti, J. Kusch, C. Lubich,
        "A parallel rank-adaptive integrator for dynamical low-rank approximation" (2023),
        arXiv 2304.05660; of tensors: E. Zangrando, S. Schotthöfer, G. Ceruti, J. Kusch,
        F. Tudisco, "Geometry-aware training of factorized layers in tensor Tucker format"
        (2023), arXiv 2305.19059. Special case: a step of gradient descent on the manifold
        of matrices of a rank.
    """
    check_non_negative("dynamical_low_rank", "tol", tol)
    if method not in get_args(Method):
        raise ValueError(
            f"method must be 'parallel', 'augmented' or 'kls', got {method!r}."
        )
    inner = optax.with_extra_args_support(inner)
    always = isinstance(every, int) and every == 1

    def init(params):
        check_forms("dynamical_low_rank", params, is_form)
        tree = NodeTree.of(params, is_form)
        used = lambda x: columns_used(x) if is_whole(x) else optax.MaskedNode()
        rank = tree.treedef.unflatten(map(used, tree.leaves))
        cores = {i: in_use(tree.leaves[i], None).core for i in tree.places}
        inner_state = inner.init(tree.with_leaves(cores))
        if cores:
            check_moments_known(inner_state)
        return DynamicalLowRankState(jnp.zeros((), jnp.int32), rank, inner_state)

    def update(updates, state, params=None, *, value_and_grad_fn=None, **extra):
        tree = tree_of("dynamical_low_rank", params, updates, is_form)
        if method == "kls" and value_and_grad_fn is None and tree.places:
            raise ValueError(
                "dynamical_low_rank(method='kls') takes a second gradient: call "
                "tx.update(grads, state, params, value_and_grad_fn=f) with f(params) -> "
                "(value, grads) of the same data."
            )
        rank, grads = tree.like(state.rank), tree.like(updates)
        start = {i: in_use(tree.leaves[i], rank[i]) for i in tree.places}
        told = {} if params is None else {"params": params}
        step = LowRankStep(
            inner, tol, project, moments, tree, grads, start, {**told, **extra}
        )
        second = value_and_grad_fn if method == "kls" else None
        begins, ends = (any_member((state.count + k) % every == 0) for k in (0, 1))
        if method == "augmented":
            moved, steps, inner_state = step.within_wide_bases(begins, ends, state.inner)
        elif always:
            moved, steps, inner_state = step.whole(state.inner, second)
        else:
            moved, steps, inner_state = lax.cond(
                begins,
                lambda inner_state: step.whole(inner_state, second),
                step.of_cores,
                state.inner,
            )
        for i, (node, active) in moved.items():
            steps[i], rank[i] = node, active
        rank, steps = tree.treedef.unflatten(rank), tree.treedef.unflatten(steps)
        return steps, DynamicalLowRankState(increment(state.count), rank, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
