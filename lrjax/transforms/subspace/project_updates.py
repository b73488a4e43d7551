from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray, PyTree

from ..._sharding import placed_like
from ...linalg.gram import working_dtype
from ...subspaces.bases.basis import Basis
from ...subspaces.carry import Carry, check_roles, keep, read_moments, write_moments
from ...subspaces.lift import Feedback, Lift, Projected, project
from ...subspaces.refresh import (
    LeafState,
    Loop,
    Plan,
    init_leaf,
    make_plan,
    refresh_leaf,
    use_frame,
)
from ...subspaces.schedule import Schedule, Turn, every
from ...subspaces.view import MatrixSpec, is_hidden_matrix


Where = Callable[[str, tuple[int, ...]], bool | MatrixSpec]


class ProjectUpdatesState(NamedTuple):
    """The state of :func:`project_updates`.

    Attributes:
        count: the number of steps.
        inner: the state of the inner transform, on the projected tree.
        leaves: a tree like the parameters, with a ``LeafState`` for each projected leaf
            and an empty tuple for each other one.
    """

    count: Int[Array, ""]
    inner: Any
    leaves: PyTree


def project_updates(
    inner: optax.GradientTransformation,
    basis: Basis,
    *,
    schedule: Schedule | None = None,
    carry: Carry | None = None,
    lift: Lift | None = None,
    feedback: Feedback | None = None,
    where: Where = is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run any optax transform inside a low-rank subspace of each matrix's gradient.

    For a matrix with gradient ``a (m, n)`` and a basis ``P (m, r)`` of its columns a
    step is, in this order::

        a ← a + e                          feedback, if any
        P ← basis.refresh(a)               if the schedule says so
        moments ← carry(moments, PᵀP_old)
        R = Pᵀ a                           (r, n)
        N = inner(R)
        U = lift(N, a − P R)               (m, n)
        e ← what was left out              feedback, if any

    A basis of the rows, ``P (n, r)``, acts from the right: ``R = a P (m, r)``. The inner
    transform sees one tree, of the structure of the gradients, in which the projected
    leaves are ``(batch…, r, n)`` or ``(batch…, m, r)`` and all others are as they are, so
    that its counts, schedules and global norms mean what they always do. It gets no
    params: weight decay and learning rate go behind ``project_updates`` in the chain.

    States live in float32 or wider and the updates come back in the gradient's dtype.
    Gradients that are zero or not finite never enter a basis. Under ``vmap`` the
    members share one schedule.

    Args:
        inner: the transform that works in the subspace.
        basis: which subspace: ``lrjax.subspaces.power``, ``svd``, ``gaussian``, …
        schedule: when it is refreshed; ``lrjax.subspaces.every(200)`` by default.
        carry: what happens to the inner moments then; ``keep()`` by default.
        lift: how the inner step becomes an update; ``project()`` by default.
        feedback: ``lrjax.subspaces.error_feedback()``, or None.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to project. True takes the last two axes as the matrix and leading
            ones as a batch of them. By default matrices but embeddings and heads.
        key: source of the random numbers; they depend on it, the leaf and the step
            alone. ``jax.random.key(0)`` by default.

    Returns:
        The transform. Its ``update`` takes ``refresh=True`` for external schedules.

    Raises:
        ValueError: if the lift or the feedback needs an orthonormal basis and this one
            is not; at ``init``, if no leaf is projected, a chosen leaf is no matrix, or
            the carry does not know the fields of the inner state.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), lrjax.subspaces.power(2))
        >>> params = {"weight": jnp.ones((8, 16))}
        >>> state = tx.init(params)
        >>> state.inner.mu["weight"].shape
        (2, 16)

    Reference:
        J. Zhao, Z. Zhang, B. Chen, Z. Wang, A. Anandkumar, Y. Tian, "GaLore" (2024),
        arXiv 2403.03507, and the methods named at ``lrjax.subspaces``.
    """
    loop = Loop(
        basis,
        every(200) if schedule is None else schedule,
        keep() if carry is None else carry,
        project() if lift is None else lift,
        feedback,
    )
    if not basis.orthonormal and (loop.lift.needs_orthonormal or feedback is not None):
        raise ValueError(
            "This lift or feedback takes a − P Pᵀ a for the part outside the subspace, "
            "which needs an orthonormal basis: replace the basis (for instance by "
            "lrjax.subspaces.random_orthonormal), or use the lifts project, blend or "
            "apollo without feedback."
        )
    inner = optax.with_extra_args_support(inner)
    leaf_key = lambda plan: jr.fold_in(jr.key(0) if key is None else key, plan.leaf)

    def init(params):
        plans, leaves, treedef = _plan(params, basis, where)
        if leaves and not any(plans):
            raise ValueError(
                "project_updates found no matrix to project among "
                f"{', '.join(jtu.keystr(p) for p, _ in _with_path(params)[:5])}: the "
                "default where= skips vectors, matrices under 8 rows or columns, "
                "embeddings and heads. Pass where=lambda path, shape: … to choose."
            )
        states, proxies = [], []
        for plan, x in zip(plans, leaves, strict=True):
            if plan is None:
                states.append(())
                proxies.append(_working(x))
                continue
            a = jnp.zeros_like(_working(plan.view(x)))
            state = init_leaf(loop, plan, a, leaf_key(plan))
            states.append(state)
            frame = use_frame(loop, plan, state.basis, leaf_key(plan))
            proxies.append(frame.down(a))
        inner_state = inner.init(treedef.unflatten(proxies))
        if loop.carry.apply is not None:
            check_roles(inner_state)
        return ProjectUpdatesState(
            jnp.zeros((), jnp.int32), inner_state, treedef.unflatten(states)
        )

    def update(updates, state, params=None, *, refresh=False, **extra):
        del params
        plans, leaves, treedef = _plan(updates, basis, where)
        count, inner_state = state.count, state.inner
        states = treedef.flatten_up_to(state.leaves)
        projected = {i: plan for i, plan in enumerate(plans) if plan is not None}
        gradients = [
            _working(x) if plan is None else _matrices(plan, x, leaf)
            for plan, x, leaf in zip(plans, leaves, states, strict=True)
        ]
        losses: dict[int, Any] = {}

        def refresh_all(inner_state, down):
            moments = read_moments(inner_state, treedef)
            for i, plan in projected.items():
                turn = Turn(count, plan.leaf, len(projected))
                states[i], moments[i], losses[i] = refresh_leaf(
                    loop,
                    plan,
                    gradients[i],
                    states[i],
                    moments[i],
                    turn,
                    leaf_key(plan),
                    refresh,
                    down.get(i),
                )
            return write_moments(inner_state, treedef, moments)

        if loop.schedule.when == "before":
            inner_state = refresh_all(inner_state, {})
        frames = {
            i: use_frame(loop, plan, states[i].basis, leaf_key(plan))
            for i, plan in projected.items()
        }
        down = list(gradients)
        for i in projected:
            down[i] = frames[i].down(gradients[i])
        steps, inner_state = inner.update(
            treedef.unflatten(down), inner_state, None, **extra
        )
        steps = treedef.flatten_up_to(steps)
        for i, plan in projected.items():
            # The number of the step is folded in after the leaf, as for the bases.
            at = jr.fold_in(leaf_key(plan), count)
            x = Projected(gradients[i], down[i], steps[i], frames[i], at, count)
            steps[i], lifted = loop.lift.apply(x, states[i].lift)
            states[i] = states[i]._replace(lift=lifted)
        if loop.schedule.when == "after":
            inner_state = refresh_all(inner_state, {i: down[i] for i in projected})
        out = list(steps)
        for i, plan in projected.items():
            if feedback is not None:
                error = gradients[i] - frames[i].up(down[i])
                error = error + _momentum_error(feedback, losses[i])
                error = plan.restore(error).astype(states[i].error.dtype)
                states[i] = states[i]._replace(error=error)
            out[i] = plan.restore(placed_like(steps[i], gradients[i]))
        out = [
            u.astype(g.dtype) if hasattr(u, "astype") else u
            for u, g in zip(out, leaves, strict=True)
        ]
        return treedef.unflatten(out), ProjectUpdatesState(
            jnp.asarray(optax.safe_increment(count)),
            inner_state,
            treedef.unflatten(states),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _with_path(tree: PyTree) -> list[tuple[Any, Any]]:
    return jtu.tree_flatten_with_path(tree)[0]


def _plan(
    tree: PyTree, basis: Basis, where: Where
) -> tuple[list[Plan | None], list[Any], Any]:
    """Which leaves of a tree are projected, and how."""
    flat, treedef = jtu.tree_flatten_with_path(tree)
    plans: list[Plan | None] = []
    leaf = 0
    for path, x in flat:
        shape, name = tuple(jnp.shape(x)), jtu.keystr(path)
        spec = where(name, shape)
        if spec is False:
            plans.append(None)
            continue
        spec = MatrixSpec() if spec is True else spec
        plans.append(make_plan(name or "the root", leaf, shape, spec, basis))
        leaf += 1
    return plans, [x for _, x in flat], treedef


def _working(x: ArrayLike) -> Array:
    """A leaf in the dtype of the computation; integers and bools as they are."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(working_dtype(x.dtype))


def _matrices(plan: Plan, x: Array, leaf: LeafState) -> Array:
    """The gradient as matrices, with what earlier steps left out."""
    a = _working(plan.view(x))
    if isinstance(leaf.error, tuple):
        return a
    return a + plan.view(leaf.error).astype(a.dtype)


def _momentum_error(feedback: Feedback, lost: Any) -> Any:
    if isinstance(lost, tuple):
        return 0.0
    return feedback.b1 / (1 - feedback.b1) * lost
