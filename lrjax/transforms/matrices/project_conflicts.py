import functools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real, path_name
from ..._sharding import einsum
from ...linalg import nonzero, working_dtype
from .._checks import check_non_negative


class ProjectConflictsState(NamedTuple):
    """What the last update of :func:`project_conflicts` met.

    Attributes:
        conflicts: with how many memories the update was in conflict before.
        violation: how much of a conflict is left, ``max(0, -cos)`` of the largest angle
            between the result and the gradient of a memory: zero up to rounding, unless
            there was a damping or the sweeps were too few.
    """

    conflicts: Int[Array, ""]
    violation: Float[Array, ""]


@checks_trees
def project_conflicts(
    margin: ArrayLike = 0.0,
    *,
    of: Literal["gradients", "steps"] = "gradients",
    damping: ArrayLike = 0.0,
    sweeps: int = 50,
) -> optax.GradientTransformationExtraArgs:
    """Change an update as little as it takes to harm no memory.

    A memory is a few samples of what came before, ``m_i`` the gradient of their loss at
    the present parameters, as one vector. An update with ``⟨g, m_i⟩ < 0`` raises that loss.
    If there is such an i, the nearest vector without one takes the place of g::

        g ← argmin ½ ‖g' − g‖²  with  ⟨g', m_i⟩ ≥ 0 for i = 1 … t

    and otherwise g stays as it is. The solution is ``g' = g + Σ v_i m_i`` with ``v ≥ 0``
    that minimizes ``½ vᵀ M Mᵀ v + vᵀ M g``: for one memory ``v = −⟨g, m⟩ / ‖m‖²``, for more
    of them sweeps over its t numbers, each set to its minimum. A memory whose gradient is
    zero binds nothing: fill those that are still empty with zeros.

    What comes behind it must not change directions: put it last, behind Adam and weight
    decay, before the learning rate alone. Behind a whole optimizer, whose updates are what
    is added to the parameters, it is ``of="steps"``, with all signs turned.

    ``optax.tree.get(state, "violation")`` says whether the sweeps were enough.

    Args:
        margin: the least ``v_i`` once there is a conflict: above zero it pulls toward all
            memories, also those that are not in conflict. It multiplies the ``m_i`` as
            they are, and so has the scale of g over that of theirs.
        of: what comes in: ``"gradients"``, which a learning rate behind it turns to steps,
            or ``"steps"``.
        damping: added to ``M Mᵀ``, as a share of each ``‖m_i‖²``: a conflict is then
            taken away but for this share, at most. For memories whose gradients are
            nearly alike.
        sweeps: over the memories, if there is more than one.

    Returns:
        An optax transform; ``update`` needs ``memory``, a tree like the updates with a
        leading axis of the t memories on all leaves.

    Raises:
        TypeError: in ``init``, for complex parameters.
        ValueError: at construction, for a negative number, another ``of`` or no sweep; in
            ``update``, if ``memory`` is missing, or by path where it does not fit.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.project_conflicts()
        >>> g = {"w": jnp.array([1.0, -2.0, 0.5])}
        >>> memory = {"w": jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])}
        >>> new, state = tx.update(g, tx.init(g), memory=memory)
        >>> print(new["w"], state.conflicts)
        [1.  0.  0.5] 1

    Reference:
        D. Lopez-Paz, M. Ranzato, "Gradient episodic memory for continual learning" (2017),
        arXiv 1706.08840 (GEM: a memory for each task, and a margin, 0.5 there); A.
        Chaudhry, M. Ranzato, M. Rohrbach, M. Elhoseiny, "Efficient lifelong learning with
        A-GEM" (2018), arXiv 1812.00420 (one memory of all tasks). Special case: of one
        memory in conflict the result is orthogonal to it.
    """
    check_non_negative("project_conflicts", "margin", margin)
    check_non_negative("project_conflicts", "damping", damping)
    if of not in ("gradients", "steps"):
        raise ValueError(
            f"project_conflicts takes of='gradients' or of='steps', got {of!r}."
        )
    if sweeps < 1:
        raise ValueError(f"project_conflicts needs at least one sweep, got {sweeps}.")
    sign = 1 if of == "gradients" else -1

    def init(params):
        check_real("project_conflicts", params)
        return ProjectConflictsState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(updates, state, params=None, *, memory: Any = None, **extra):
        del params, extra
        pairs = _pairs(updates, memory)
        if not pairs:
            return updates, state
        gram = _sum(_products(m, m) for _, m in pairs)
        along = sign * _sum(_products(m, g[None])[:, 0] for g, m in pairs)
        size = jnp.sqrt(_sum(_products(g[None], g[None])[0, 0] for g, _ in pairs))
        # All memories at length one: it is the same problem, and its numbers are cosines.
        lengths = jnp.sqrt(jnp.diagonal(gram))
        unit = nonzero(lengths)
        cosines, along = gram / (unit[:, None] * unit[None]), along / unit
        least = jnp.asarray(margin, along.dtype) * lengths
        v = _nearest(cosines, along, least, damping, sweeps)
        v = jnp.where(jnp.any(along < 0), v, 0)
        left = along + cosines @ v
        new = ProjectConflictsState(
            jnp.sum(along < 0, dtype=jnp.int32),
            jnp.max(jnp.maximum(-left, 0) / nonzero(size)).astype(jnp.float32),
        )
        add = lambda g, m: _moved(g, m, sign * v / unit)
        return jax.tree.map(add, updates, memory), new

    return optax.GradientTransformationExtraArgs(init, update)


def _nearest(
    cosines: Float[Array, "t t"],
    along: Float[Array, " t"],
    least: Float[Array, " t"],
    damping: ArrayLike,
    sweeps: int,
) -> Float[Array, " t"]:
    """The ``v ≥ least`` that minimizes ``½ vᵀ (C + damping I) v + vᵀ along``."""
    count = len(along)
    damping = jnp.asarray(damping, along.dtype)

    def one(index, v):
        i = index % count
        slope = cosines[i] @ v + damping * v[i] + along[i]
        return v.at[i].set(jnp.maximum(least[i], v[i] - slope / (1 + damping)))

    # Of one number the first step is the minimum.
    return lax.fori_loop(0, 1 if count == 1 else count * sweeps, one, least)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def _products(x: Array, y: Array) -> Float[Array, "t s"]:
    """The inner products of two stacks of one leaf, in float32 or wider."""
    wide = working_dtype(jnp.promote_types(x.dtype, y.dtype))
    axes = "abcdefghijklmnopqrstuvwxyz"[: x.ndim - 1]
    subscripts = f"T{axes},S{axes}->TS"
    return einsum(subscripts, x.astype(wide), y.astype(wide))


def _moved(g: Array, m: Array, v: Float[Array, " t"]) -> Array:
    wide = jnp.promote_types(g.dtype, v.dtype)
    axes = "abcdefghijklmnopqrstuvwxyz"[: g.ndim]
    step = einsum(f"T,T{axes}->{axes}", v.astype(wide), m.astype(wide))
    return (g.astype(wide) + step).astype(g.dtype)


def _pairs(updates: PyTree, memory: PyTree) -> list[tuple[Array, Array]]:
    """The leaves of an update, each with that of the memories."""
    if memory is None:
        raise ValueError(
            "project_conflicts needs the extra argument memory: call tx.update(grads, "
            "state, params, memory=…) with the gradients on past samples, a tree like "
            "grads with a leading axis of one or more memories on all leaves."
        )
    found = dict(jtu.tree_flatten_with_path(memory)[0])
    pairs, counts = [], set()
    for path, g in jtu.tree_flatten_with_path(updates)[0]:
        m = found.get(path)
        if m is None or m.shape[1:] != g.shape or m.ndim == g.ndim:
            got = "nothing" if m is None else f"an array of shape {m.shape}"
            raise ValueError(
                "project_conflicts needs memory like the updates, with a leading axis: for "
                f"{path_name(path) or 'the root'} of shape {g.shape} it has {got}. Of one "
                "memory: jax.tree.map(lambda m: m[None], gradient)."
            )
        pairs.append((g, m))
        counts.add(len(m))
    if len(counts) > 1:
        raise ValueError(
            "project_conflicts needs the same number of memories on all leaves, got "
            f"{sorted(counts)}."
        )
    return pairs
