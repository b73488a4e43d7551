import math
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real, path_name
from ...linalg import cross, outer, times


class ProjectOutState(NamedTuple):
    """The state of :func:`project_out`: the bases, as they were given."""

    basis: PyTree


@runtime_checkable
class Projection(Protocol):
    """A basis that knows how to remove itself from updates, over several leaves at once."""

    def project_out(self, updates: PyTree) -> PyTree:
        """The updates without what lies in the span."""
        ...


@checks_trees
def project_out(
    basis: PyTree | Projection, *, side: Literal["left", "right"] = "right"
) -> optax.GradientTransformation:
    """Remove from each update what lies in a given subspace.

    ``U ← U − U M Mᵀ`` with orthonormal columns ``M (n, k)``, or ``U ← U − M Mᵀ U`` from the
    left, ``M (m, k)``. For ``W (out, in)`` and inputs ``x`` in the span of ``M`` the layer
    then goes on giving what it gave, ``U x = 0``: earlier tasks are not forgotten. Put it
    behind everything that rescales entries, Adam or weight decay: what they make of a
    projected gradient leaves the complement again.

    The bases are part of the state. When a task ends, give the run new ones with
    ``optax.tree.set(state, basis=…)``; zero columns do nothing, so that room for later
    tasks can be kept and nothing compiles anew. :func:`lrjax.subspaces.grow_basis` adds
    the directions of a task to them.

    Subspaces that are not those of one matrix project themselves:
    :class:`lrjax.continual.InputBases` of a weight together with its bias, found for every
    layer of a model, and :class:`lrjax.continual.GradientBasis` of all parameters at once.

    Args:
        basis: a tree like the parameters, ``None`` where nothing is to be removed; leading
            axes of ``M`` are those of a stack of layers. The rows of ``M`` may be several
            axes of a leaf in one, those of a kernel ``(out, in, height, width)`` with
            ``M (in · height · width, k)``. Or an object with ``project_out(updates)``.
        side: the side of the update that ``M`` is applied from. Of an object there is none.

    Returns:
        The transform.

    Raises:
        ValueError: at ``init``, if no basis belongs to a leaf, or one does not fit.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.project_out({"w": jnp.array([[1.0], [0.0]]), "b": None})
        >>> g = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
        >>> print(tx.update(g, tx.init(g))[0]["w"])
        [[0. 1.]
         [0. 1.]
         [0. 1.]]

    Reference:
        M. Farajtabar et al., "Orthogonal gradient descent for continual learning" (2019),
        arXiv 1910.07104; G. Saha, I. Garg, K. Roy, "Gradient projection memory for
        continual learning" (2021), arXiv 2103.09762.
    """
    axis = {"left": -2, "right": -1}.get(side)
    if axis is None:
        raise ValueError(f"project_out takes side 'left' or 'right', got {side!r}.")

    if isinstance(basis, Projection):
        return _of_projection(basis)

    def init(params):
        check_real("project_out", params)
        shapes = {p: jnp.shape(x) for p, x in jtu.tree_flatten_with_path(params)[0]}
        found = [(p, m) for p, m in jtu.tree_flatten_with_path(basis)[0] if p in shapes]
        arrays = any(len(shape) for shape in shapes.values())
        if arrays and not found:
            raise ValueError(
                "project_out found no leaf at the path of any basis: give a tree like the "
                f"parameters, whose leaves are {', '.join(map(path_name, shapes))}."
            )
        for path, m in found:
            shape = shapes[path]
            if _matrix_of(shape, jnp.shape(m), axis) is None:
                raise ValueError(
                    f"project_out was given a basis of shape {m.shape} for the leaf "
                    f"{path_name(path) or 'the root'} of shape {shape}: on the {side} "
                    "side it needs (…, rows of that side, k)."
                )
        return ProjectOutState(basis)

    def update(updates, state, params=None):
        del params
        bases = dict(jtu.tree_flatten_with_path(state.basis)[0])

        def remove(path, u):
            return u if path not in bases else _remove(u, bases[path], axis)

        return jtu.tree_map_with_path(remove, updates), state

    return optax.GradientTransformation(init, update)


def _of_projection(basis: Any) -> optax.GradientTransformation:
    def init(params):
        check_real("project_out", params)
        # A tree of placeholders has nothing in it that could fit.
        if any(jnp.ndim(x) for x in jtu.tree_leaves(params)):
            jax.eval_shape(basis.project_out, params)
        return ProjectOutState(basis)

    def update(updates, state, params=None):
        del params
        return state.basis.project_out(updates), state

    return optax.GradientTransformation(init, update)


def _matrix_of(
    shape: tuple[int, ...], m: tuple[int, ...], axis: int
) -> tuple[int, ...] | None:
    """The shape in which a leaf is multiplied by a basis, or None if it does not fit.

    The axes next to the stack, or the last ones, that have as many numbers as the basis
    has rows are one axis.
    """
    if len(shape) < 2 or len(m) < 2:
        return None
    if len(shape) > len(m):
        stack, rest = shape[: len(m) - 2], shape[len(m) - 2 :]
        sizes = [math.prod(rest[:i]) for i in range(1, len(rest))]
        if axis == -1:
            sizes = [math.prod(rest[i:]) for i in range(1, len(rest))]
        if m[-2] in sizes and all(a in (1, b) for a, b in zip(m[:-2], stack, strict=True)):
            other = math.prod(rest) // m[-2]
            return (*stack, m[-2], other) if axis == -2 else (*stack, other, m[-2])
    return shape if shape[axis] == m[-2] else None


def _remove(u: Array, m: Array, axis: int) -> Array:
    wide = u.astype(jnp.promote_types(u.dtype, m.dtype))
    m = m.astype(wide.dtype)
    matrix = _matrix_of(u.shape, m.shape, axis)
    wide = wide if matrix in (None, u.shape) else wide.reshape(matrix)
    if axis == -1:
        rest = wide - outer(times(wide, m), m)
    else:
        rest = wide - times(m, cross(m, wide))
    return rest.reshape(u.shape).astype(u.dtype)
