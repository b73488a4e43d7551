"""How the sides of a layer have grown, from the shapes of two trees."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree

from ._matrices import (
    MatrixSpec,
    is_input_first,
    is_norm_or_bias,
    matrix_axes,
    named_leaves,
)
from ._sites import flat_leaves, is_layer, layer_site
from .lowrank import SVDForm, TuckerForm, is_low_rank


Sides = Callable[[str, tuple[int, ...]], MatrixSpec | None]


class Growth(NamedTuple):
    """How many times larger the sides of one leaf are than those of its base.

    Attributes:
        outputs: the fan-out.
        inputs: the fan-in; of a vector 1, for nothing is summed over.
    """

    outputs: float
    inputs: float


class Widths:
    """The shapes of a tree, to which the leaves of wider ones are compared.

    Args:
        function: who asks, for the errors.
        base: parameters, or their shapes.
        axes: which axes of a leaf are outputs (``rows``) and inputs (``cols``), where that
            is not the usual; ``None`` for what is.
    """

    def __init__(self, function: str, base: PyTree, axes: Sides | None = None):
        self.function = function
        self.shapes = {
            path: x.shape for path, x in named_leaves(base)[0] if hasattr(x, "shape")
        }
        self.specs = _specs_of_layers(base) | _specs_of_nodes(function, base)
        for path, shape in self.shapes.items():
            if axes is not None and (spec := axes(path, shape)) is not None:
                self.specs[path] = spec

    def growth(self, path: str, shape: tuple[int, ...]) -> Growth:
        """That of the leaf at a path."""
        where, base = path or "the root", self.shapes.get(path)
        if base is None or len(base) != len(shape):
            raise ValueError(
                f"{self.function} compares each leaf with that of its base, and {where} of "
                f"shape {shape} "
                + ("is not in it" if base is None else f"has shape {base} there")
                + ": the base is the same tree, built with other widths."
            )
        spec = self.specs.get(path) or _usual(path, shape)
        if spec is None:
            return Growth(math.prod(shape) / max(1, math.prod(base)), 1.0)
        stack, rows, cols = matrix_axes(len(shape), spec)
        if any(shape[axis] != base[axis] for axis in stack):
            raise ValueError(
                f"{self.function} compares layers one by one, and {where} of shape {shape} "
                f"has another number of them than its base of shape {base}; or its outputs "
                "and inputs are other axes than the last two: name them with axes=."
            )
        ratio = lambda axes: math.prod(shape[axis] / base[axis] for axis in axes)
        return Growth(ratio(rows), ratio(cols))

    def map(self, f: Callable[..., Any], tree: PyTree) -> PyTree:
        """``f(growth, leaf, path)`` for each array of a tree; what is none stays."""
        leaves, structure = named_leaves(tree)
        return structure.unflatten(
            [
                f(self.growth(path, x.shape), x, path)
                if eqx.is_inexact_array(x) or isinstance(x, jax.ShapeDtypeStruct)
                else x
                for path, x in leaves
            ]
        )


def _usual(path: str, shape: tuple[int, ...]) -> MatrixSpec | None:
    """The axes of an array that belongs to no known layer; ``None`` for a vector."""
    if len(shape) < 2 or is_norm_or_bias(path):
        return None
    table = path.split(".")[-1] == "embedding"  # of Flax: (vocabulary, size)
    return _TRANSPOSED if table or is_input_first(path) else MatrixSpec()


_TRANSPOSED = MatrixSpec(rows=(-1,), cols=(-2,))


def _specs_of_layers(base: PyTree) -> dict[str, MatrixSpec]:
    """Of the weights of the layers of a model."""
    found = {}
    for path, layer in flat_leaves(base)[0]:
        if not is_layer(layer):
            continue
        own = f"{path}.weight" if path else "weight"
        kind, weight = layer_site(path, layer).kind, getattr(layer, "weight", None)
        if is_low_rank(weight):
            found |= _factors(own, turned=kind == "lookup")
        elif kind == "conv":
            taps = layer.num_spatial_dims
            found[own] = MatrixSpec((-taps - 2,), tuple(range(-taps - 1, 0)))
        elif kind == "lookup":
            found[own] = _TRANSPOSED
    return found


def _specs_of_nodes(function: str, base: PyTree) -> dict[str, MatrixSpec]:
    """Of the factors of nodes that are in no layer."""
    stops = lambda x: is_layer(x) or isinstance(x, SVDForm | TuckerForm) or is_low_rank(x)
    found = {}
    for path, node in named_leaves(base, stops)[0]:
        inner = getattr(node, "weight", None) if is_layer(node) else node
        if isinstance(inner, SVDForm | TuckerForm):
            raise ValueError(
                f"{function} found a {type(inner).__name__} at {path or 'the root'}: its "
                "factors are orthonormal and keep their size. Use LowRank nodes, of layers "
                'with form="pair", or keep it out with optax.masked.'
            )
        if is_low_rank(node):
            found |= _factors(path, turned=False)
    return found


def _factors(path: str, *, turned: bool) -> dict[str, MatrixSpec]:
    """Of ``left (out, r)`` and ``right (in, r)``, layers of their own through ``r``."""
    dot = f"{path}." if path else ""
    out, into = ("right", "left") if turned else ("left", "right")
    return {f"{dot}{out}": MatrixSpec(), f"{dot}{into}": _TRANSPOSED}
