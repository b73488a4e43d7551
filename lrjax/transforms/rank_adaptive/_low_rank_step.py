"""One step of matrices in bases that move: augment, update, truncate."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, PyTree

from ..._moments import Moments, read_moments, write_moments
from ...linalg import cross, outer, rounding
from ...lowrank import (
    LowRank,
    SVDForm,
    augment,
    project_to_tangent,
    transport_core,
    truncate,
)
from ._nodes import NodeTree, aligned, difference, masked


Nodes = dict[int, SVDForm]  # by their places among the leaves
Moved = dict[int, tuple[SVDForm, Array | None]]  # the update of a node, and its rank
Outcome = tuple[Moved, list[Any], Any]  # and other updates, and the inner state


@dataclasses.dataclass(frozen=True)
class LowRankStep:
    """One update: the settings, and the tree that it is of.

    Attributes:
        inner: as of the transform, with the next three.
        tree: the parameters.
        grads: the gradients of their leaves.
        start: the nodes in the working dtype, masked by their ranks.
        extra: arguments for ``inner``.
    """

    inner: optax.GradientTransformationExtraArgs
    tol: ArrayLike
    project: Callable[[SVDForm], SVDForm] | None
    moments: str
    tree: NodeTree
    grads: list[Any]
    start: Nodes
    extra: dict[str, Any]

    def whole(self, inner_state, value_and_grad_fn) -> Outcome:
        """Augment, update, truncate."""
        wide, slopes, inner_state = self._widened(inner_state, 2)
        grads = self.grads
        if value_and_grad_fn is not None:
            grads, slopes = _second_gradient(value_and_grad_fn, self.tree, wide)
        nodes, steps, inner_state = self._stepped(wide, slopes, grads, inner_state)
        nodes, inner_state = self._narrowed(nodes, inner_state)
        return self._moved(nodes), steps, inner_state

    def of_cores(self, inner_state) -> Outcome:
        """An update in the bases there are."""
        nodes, steps, inner_state = self._stepped(
            self.start, self._slopes(), self.grads, inner_state
        )
        moved = {}
        for i, x in nodes.items():
            still = jax.tree.map(jnp.zeros_like, self.tree.leaves[i])
            core = difference(x, self.tree.leaves[i]).core
            moved[i] = (SVDForm(still.left, core, still.right), x.active)
        return moved, steps, inner_state

    def within_wide_bases(self, begins: Array, ends: Array, inner_state) -> Outcome:
        """Augment at the beginning of a period, truncate at its end."""
        nodes, slopes, inner_state = lax.cond(
            begins,
            lambda state: self._widened(state, 1),
            lambda state: (self.start, self._slopes(), state),
            inner_state,
        )
        nodes, steps, inner_state = self._stepped(nodes, slopes, self.grads, inner_state)
        as_they_are = lambda nodes, state: (nodes, state)
        nodes, inner_state = lax.cond(ends, self._narrowed, as_they_are, nodes, inner_state)
        return self._moved(nodes), steps, inner_state

    def _moved(self, nodes: Nodes) -> Moved:
        leaves = self.tree.leaves
        return {i: (difference(x, leaves[i]), x.active) for i, x in nodes.items()}

    def _slopes(self) -> dict[int, Array]:
        return {i: masked(x, self.grads[i].core) for i, x in self.start.items()}

    def _widened(self, inner_state, times: int) -> tuple[Nodes, dict[int, Array], Any]:
        """Wider bases, the gradient of the core in them, and the moments there."""
        wide, slopes = {}, {}
        for i, x in self.start.items():
            tangent = project_to_tangent(x, self.grads[i])
            wide[i] = y = augment(
                x,
                tangent.left,
                tangent.right,
                used=x.active,
                width=times * x.left.shape[-1],
                method="cholesky",
            )
            slopes[i] = masked(y, _seen(tangent, x, y))
        return wide, slopes, self._carried(inner_state, self.start, wide)

    def _stepped(
        self, nodes: Nodes, slopes: dict[int, Array], grads: list[Any], inner_state
    ) -> tuple[Nodes, list[Any], Any]:
        """One step of the inner optimizer on the cores and on all other leaves."""
        extra, treedef = dict(self.extra), self.tree.treedef
        if "params" in extra:
            extra["params"] = self.tree.with_leaves({i: x.core for i, x in nodes.items()})
        grads = [slopes.get(i, g) for i, g in enumerate(grads)]
        steps, inner_state = self.inner.update(
            treedef.unflatten(grads), inner_state, **extra
        )
        steps, new = self.tree.like(steps), {}
        for i, x in nodes.items():
            core = x.core + masked(x, steps[i])
            new[i], steps[i] = SVDForm(x.left, core, x.right, x.active), None
        return new, steps, inner_state

    def _narrowed(self, nodes: Nodes, inner_state) -> tuple[Nodes, Any]:
        """Back to the width of the nodes, by the tolerance."""
        new = {}
        for i, x in nodes.items():
            y = truncate(x, self.start[i].left.shape[-1], tol=self.tol)
            y = y if self.project is None else self.project(y)
            new[i] = aligned(y, self.start[i])
        return new, self._carried(inner_state, nodes, new)

    def _carried(self, inner_state, old: Nodes, new: Nodes) -> Any:
        """The inner state with the moments of the cores in other bases."""
        known = read_moments(inner_state, self.tree.treedef)
        for i, x in new.items():
            left, right = cross(x.left, old[i].left), cross(x.right, old[i].right)
            known[i] = [_transported(m, x, left, right, self.moments) for m in known[i]]
        return write_moments(inner_state, self.tree.treedef, known)


def _seen(tangent: LowRank, x: SVDForm, wide: SVDForm) -> Array:
    """A tangent at ``x`` in the wider bases; what is zero but for rounding is zero.

    Adam would make whole steps of it.
    """
    left = outer(cross(wide.left, tangent.left), cross(wide.right, x.right))
    right = outer(cross(wide.left, x.left), cross(wide.right, tangent.right))
    slope = left + right
    sums = lambda axis: jnp.sum(slope**2, axis=axis, keepdims=True)
    floor = rounding(slope.dtype, max(x.shape[-2:])) ** 2 * sums((-2, -1))
    place = lax.broadcasted_iota(jnp.int32, slope.shape, slope.ndim - 1)
    column = place >= jnp.asarray(x.active)[..., None, None]
    row = column.mT
    nothing = (row & column) | (row & (sums(-1) <= floor)) | (column & (sums(-2) <= floor))
    return jnp.where(nothing, 0, slope)


def _second_gradient(
    value_and_grad_fn: Callable[[PyTree], tuple[Any, PyTree]], tree: NodeTree, wide: Nodes
) -> tuple[list[Any], dict[int, Array]]:
    """The gradient at the same matrices in wider bases: of all leaves, and of the cores."""

    def as_given(i: int, x: SVDForm) -> SVDForm:
        parts = (x.left, x.core, x.right)
        return SVDForm(*(part.astype(tree.leaves[i].dtype) for part in parts))

    at = tree.with_leaves({i: as_given(i, x) for i, x in wide.items()})
    grads = tree.like(value_and_grad_fn(at)[1])
    return grads, {i: masked(x, grads[i].core) for i, x in wide.items()}


def _transported(
    old: Moments, x: SVDForm, left: Array, right: Array, moments: str
) -> Moments:
    """The moments of a core in other bases, or forgotten."""

    def move(moment: Array | None, squared: bool) -> Array | None:
        if moment is None:
            return None
        keep = 0.0 if moments == "reset" else 1.0
        new = transport_core(moment, keep * left, keep * right, squared=squared)
        return masked(x, new).astype(moment.dtype)

    return old._replace(first=move(old.first, False), second=move(old.second, True))
