import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray, PyTree

from .._arguments import checks_trees
from .._matrices import MatrixLeaf, Where, choose
from .._moments import check_moments_known, read_moments, write_moments
from .._sharding import placed_like
from ..linalg import products_at
from ._loop import (
    LeafState,
    Refreshed,
    Site,
    SubspaceConfig,
    init_leaf,
    make_site,
    projector,
    refresh_leaf,
    state_structure,
)
from .bases import Basis, MatrixBasis
from .error_feedback import ErrorFeedback
from .lifts import Lift, Project, Projected
from .schedules import Periodic, Schedule, ScheduleContext
from .transport import Keep, MomentTransport


class ProjectUpdatesState(NamedTuple):
    """The state of :func:`project_updates`: one tree like the parameters for each array.

    Leaves that are not projected hold ``optax.MaskedNode()``.

    Attributes:
        count: the number of steps.
        inner: the state of the inner transform, on the projected tree.
        basis: the state of the basis: a tree of matrices, or a structure of trees.
        started: whether a gradient has set the basis, where that makes a difference.
        waiting: whether a refresh is due that has had no usable gradient yet.
        schedule: the state of the schedule.
        lift: the state of the lift.
        error: the buffers of the error feedback.
    """

    count: Int[Array, ""]
    inner: Any
    basis: PyTree
    started: PyTree
    waiting: PyTree
    schedule: PyTree
    lift: PyTree
    error: PyTree


@checks_trees
def project_updates(
    inner: optax.GradientTransformation,
    basis: Basis,
    *,
    schedule: Schedule | None = None,
    carry: MomentTransport | None = None,
    lift: Lift | None = None,
    feedback: ErrorFeedback | None = None,
    where: Where | None = None,
    precision: str | None = None,
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
        basis: which subspace: ``lrjax.subspaces.Power``, ``SVD``, ``Gaussian``, …
        schedule: when it is refreshed; ``lrjax.subspaces.Periodic(200)`` by default.
        carry: what happens to the inner moments then; ``Keep()`` by default.
        lift: how the inner step becomes an update; ``Project()`` by default.
        feedback: ``lrjax.subspaces.ErrorFeedback()``, or None.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to project; paths read ``layers.0.weight``. True takes the last two axes
            as the matrix and leading ones as a batch of them. By default
            :func:`lrjax.subspaces.is_hidden_matrix`: matrices but embeddings and heads. A
            tree without any is left to the inner transform.
        precision: of the products with the gradient, as ``jax.default_matmul_precision``
            takes it: ``"highest"``, ``"tensorfloat32"``, ``"bfloat16"``, … None for the one
            in force, by default that of the platform: one pass of bfloat16 on TPU, TF32 on
            GPU, float32 on CPU. Products with bfloat16 gradients then multiply in bfloat16
            and add in float32. Moments are carried from one basis to the next at the
            precision in force, after bfloat16 gradients at full. Bases are orthonormalized,
            and compared, at full precision always.
        key: source of the random numbers; they depend on it, the leaf and the step
            alone. ``jax.random.key(0)`` by default.

    Returns:
        The transform. Its ``update`` takes ``refresh=True`` for external schedules.

    Raises:
        ValueError: if the lift or the feedback needs an orthonormal basis and this one
            is not, or ``Align`` one whose state is the matrix and this one's is not; at
            ``init``, if a given ``where`` chooses nothing or what is no matrix, or the
            carry does not know the fields of the inner state.
        TypeError: for complex leaves.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), lrjax.subspaces.Power(2))
        >>> params = {"weight": jnp.ones((8, 16))}
        >>> state = tx.init(params)
        >>> state.inner.mu["weight"].shape
        (2, 16)

    Reference:
        J. Zhao, Z. Zhang, B. Chen, Z. Wang, A. Anandkumar, Y. Tian, "GaLore:
        memory-efficient LLM training by gradient low-rank projection" (2024), arXiv
        2403.03507, and the methods named at ``lrjax.subspaces``.
    """
    config = SubspaceConfig(
        basis,
        Periodic(200) if schedule is None else schedule,
        Keep() if carry is None else carry,
        Project() if lift is None else lift,
        feedback,
    )
    _check(config)
    structure = state_structure(config)
    inner = optax.with_extra_args_support(inner)

    # Jitted by leaf, so that the leaves of one shape are traced once for all of them.
    lift_leaf = jax.jit(lambda x, state: config.lift(x, state))
    asked = functools.partial(refresh_leaf, config)
    refresh_by = {True: jax.jit(asked, static_argnums=0), False: jax.jit(asked)}

    def sites_of(tree: PyTree) -> tuple[list[Any], dict[int, Site], list[Any], Any]:
        leaves, values, treedef = choose("project_updates", tree, where)
        base = jr.key(0) if key is None else key
        chosen = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None}
        sites = {i: make_site(config, leaf, base) for i, leaf in chosen.items()}
        return leaves, sites, values, treedef

    def init(params):
        leaves, sites, values, treedef = sites_of(params)
        states: dict[int, LeafState] = {}
        proxies = _all_matrices(leaves, sites, values)
        for i, site in sites.items():
            a = jnp.zeros_like(proxies[i])
            states[i] = init_leaf(config, site, a)
            proxies[i] = projector(config, site, states[i].basis).beside(a).project(a)
        inner_state = inner.init(treedef.unflatten(proxies))
        if config.carry.moves:
            check_moments_known(inner_state)
        count = jnp.zeros((), jnp.int32)
        trees = _to_trees(structure, states, leaves, treedef)
        return ProjectUpdatesState(count, inner_state, *trees)

    def update(updates, state, params=None, *, refresh=False, **extra):
        del params
        leaves, sites, values, treedef = sites_of(updates)
        states = _to_leaves(structure, LeafState(*state[2:]), leaves, treedef)
        gradients = _all_matrices(leaves, sites, values)
        at_precision = lambda i: products_at(precision, values[i].dtype)
        if feedback is not None:
            for i in sites:
                gradients[i] += states[i].error.astype(gradients[i].dtype)
        refresh_leaf = refresh_by[isinstance(refresh, bool)]

        def refreshed(states, inner_state, down):
            moments: list = [[] for _ in leaves]
            if config.reads_moments:
                moments = read_moments(inner_state, treedef)
            new: dict[int, Refreshed] = {}
            for place, (i, site) in enumerate(sites.items()):
                when = ScheduleContext(state.count, place, len(sites))
                own = (gradients[i], states[i], moments[i], when, down.get(i))
                with at_precision(i):
                    new[i] = refresh_leaf(refresh, site, *own)
            if config.carry.moves:
                carried = [new[i].moments if i in new else m for i, m in enumerate(moments)]
                inner_state = write_moments(inner_state, treedef, carried)
            lost = {i: r.lost for i, r in new.items()}
            return {i: r.state for i, r in new.items()}, inner_state, lost

        inner_state, lost = state.inner, {}
        if config.schedule.when == "before":
            states, inner_state, lost = refreshed(states, inner_state, {})
        projectors = {
            i: projector(config, site, states[i].basis).beside(gradients[i])
            for i, site in sites.items()
        }
        down = list(gradients)
        for i, p in projectors.items():
            with at_precision(i):
                down[i] = p.project(gradients[i])
        steps, inner_state = inner.update(
            treedef.unflatten(down), inner_state, None, **extra
        )
        out = treedef.flatten_up_to(steps)
        for i, site in sites.items():
            at = jr.fold_in(site.key, state.count)
            x = Projected(gradients[i], down[i], out[i], projectors[i], at, state.count)
            with at_precision(i):
                lifted, lift_state = lift_leaf(x, states[i].lift)
            lift_state = jax.tree.map(placed_like, lift_state, states[i].lift)
            states[i] = states[i]._replace(lift=lift_state)
            out[i] = leaves[i].restore(lifted, values[i])
        if config.schedule.when == "after":
            done = {i: down[i] for i in sites}
            states, inner_state, lost = refreshed(states, inner_state, done)
        if feedback is not None:
            for i in sites:
                with at_precision(i):
                    used = feedback.used(projectors[i].lift(down[i]))
                    error = gradients[i] - placed_like(used, gradients[i])
                if (gone := lost[i]) is not None:
                    error = error + feedback.momentum_share(gone)
                error = error.astype(states[i].error.dtype)
                states[i] = states[i]._replace(error=error)
        as_given = lambda u, g: u.astype(g.dtype) if hasattr(u, "astype") else u
        count = jnp.asarray(optax.safe_increment(state.count))
        trees = _to_trees(structure, states, leaves, treedef)
        return treedef.unflatten(map(as_given, out, values)), ProjectUpdatesState(
            count, inner_state, *trees
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check(config: SubspaceConfig) -> None:
    takes_residual = config.lift.needs_orthonormal or config.feedback is not None
    if takes_residual and not config.basis.orthonormal:
        raise ValueError(
            "This lift or feedback takes a − P Pᵀ a for the part outside the subspace, "
            f"which needs an orthonormal basis, and {type(config.basis).__name__} is none: "
            "replace it (for instance by lrjax.subspaces.RandomOrthonormal), or use the "
            "lifts Project, Blend or ScaledGradient without feedback."
        )
    if config.carry.aligns and not isinstance(config.basis, MatrixBasis):
        raise ValueError(
            "Align turns the basis matrix, so it takes a basis whose state is the matrix "
            f"itself, as that of SVD; {type(config.basis).__name__} keeps more than that. "
            "Use Rotate, which moves the moments instead."
        )


def _all_matrices(
    leaves: list[Any], sites: dict[int, Site], values: list[Any]
) -> list[Array]:
    return list(map(_matrices, leaves, map(sites.get, range(len(leaves))), values))


def _matrices(leaf: MatrixLeaf | None, site: Site | None, x: ArrayLike) -> Array:
    """A leaf as matrices, in the dtype of the computation; others are only cast.

    Integers and bools stay as they are.
    """
    x = jnp.asarray(x)
    if leaf is not None and site is not None:
        x = leaf.view(x, site.axis, site.rank)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _to_trees(
    structure: Any, states: dict[int, LeafState], leaves: list[Any], treedef: Any
) -> LeafState:
    """States of leaves as one structure of trees like the parameters."""
    arrays = {i: structure.flatten_up_to(_restored(states[i], leaves[i])) for i in states}

    def tree(k: int) -> PyTree:
        of_leaf = lambda i: arrays[i][k] if i in arrays else optax.MaskedNode()
        return treedef.unflatten(map(of_leaf, range(treedef.num_leaves)))

    return structure.unflatten(map(tree, range(structure.num_leaves)))


def _to_leaves(
    structure: Any, trees: LeafState, leaves: list[Any], treedef: Any
) -> dict[int, LeafState]:
    """Undo :func:`_to_trees`."""
    columns = map(treedef.flatten_up_to, structure.flatten_up_to(trees))
    rows = enumerate(zip(*columns, strict=True))
    return {
        i: _viewed(structure.unflatten(row), leaves[i])
        for i, row in rows
        if leaves[i] is not None
    }


def _restored(state: LeafState, leaf: MatrixLeaf) -> LeafState:
    """The buffer of the error feedback in the shape of the leaf, as it is stored."""
    return state._replace(error=jax.tree.map(leaf.restore, state.error))


def _viewed(state: LeafState, leaf: MatrixLeaf) -> LeafState:
    return state._replace(error=jax.tree.map(leaf.matrices, state.error))
