from typing import Literal, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real, path_name
from ...linalg import cross, outer, times


class ProjectOutState(NamedTuple):
    """The state of :func:`project_out`: the bases, as they were given."""

    basis: PyTree


@checks_trees
def project_out(
    basis: PyTree[Float[Array, "..."] | None], *, side: Literal["left", "right"] = "right"
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

    Args:
        basis: a tree like the parameters, ``None`` where nothing is to be removed; leading
            axes of ``M`` are those of a stack of layers.
        side: the side of the update that ``M`` is applied from.

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
            if len(shape) < 2 or m.ndim < 2 or m.shape[-2] != shape[axis]:
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


def _remove(u: Array, m: Array, axis: int) -> Array:
    wide = u.astype(jnp.promote_types(u.dtype, m.dtype))
    m = m.astype(wide.dtype)
    if axis == -1:
        return (wide - outer(times(wide, m), m)).astype(u.dtype)
    return (wide - times(m, cross(m, wide))).astype(u.dtype)
