"""One step of nodes in bases that move: augment, update, truncate."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, PyTree

from ...._moments import Moments, read_moments, write_moments
from ....linalg import cross
from ....lowrank import transport_core
from ._moves import narrowed_node, widened_node
from ._nodes import Form, NodeTree, aligned, bases, difference, masked, rebuilt


Nodes = dict[int, Any]  # forms, by their places among the leaves
Moved = dict[int, tuple[Any, Array | None]]  # the update of a node, and its rank
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
    project: Callable[[Any], Any] | None
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
            moved[i] = (rebuilt(still, bases(still), core, None), x.active)
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
            wide[i], slope = widened_node(x, self.grads[i], times)
            slopes[i] = masked(wide[i], slope)
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
            new[i], steps[i] = rebuilt(x, bases(x), core, x.active), None
        return new, steps, inner_state

    def _narrowed(self, nodes: Nodes, inner_state) -> tuple[Nodes, Any]:
        """Back to the width of the nodes, by the tolerance."""
        new = {}
        for i, x in nodes.items():
            y = narrowed_node(x, self.start[i], self.tol)
            y = y if self.project is None else self.project(y)
            new[i] = aligned(y, self.start[i])
        return new, self._carried(inner_state, nodes, new)

    def _carried(self, inner_state, old: Nodes, new: Nodes) -> Any:
        """The inner state with the moments of the cores in other bases."""
        known = read_moments(inner_state, self.tree.treedef)
        for i, x in new.items():
            overlaps = list(map(cross, bases(x), bases(old[i])))
            known[i] = [_transported(m, x, overlaps, self.moments) for m in known[i]]
        return write_moments(inner_state, self.tree.treedef, known)


def _second_gradient(
    value_and_grad_fn: Callable[[PyTree], tuple[Any, PyTree]], tree: NodeTree, wide: Nodes
) -> tuple[list[Any], dict[int, Array]]:
    """The gradient at the same matrices in wider bases: of all leaves, and of the cores."""

    def as_given(i: int, x: Form) -> Form:
        dtype = tree.leaves[i].dtype
        return rebuilt(x, [u.astype(dtype) for u in bases(x)], x.core.astype(dtype), None)

    at = tree.with_leaves({i: as_given(i, x) for i, x in wide.items()})
    grads = tree.like(value_and_grad_fn(at)[1])
    return grads, {i: masked(x, grads[i].core) for i, x in wide.items()}


def _transported(old: Moments, x: Form, overlaps: list[Array], moments: str) -> Moments:
    """The moments of a core in other bases, or forgotten."""

    def move(moment: Array | None, squared: bool) -> Array | None:
        if moment is None:
            return None
        keep = 0.0 if moments == "reset" else 1.0
        kept = [keep * overlap for overlap in overlaps]
        new = transport_core(moment, *kept, squared=squared)
        return masked(x, new).astype(moment.dtype)

    return old._replace(first=move(old.first, False), second=move(old.second, True))
