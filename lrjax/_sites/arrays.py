"""Arrays that belong to no registered layer: which of their axes make the matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any

from .._matrices import MatrixLeaf, MatrixSpec, is_input_first, matrix_axes, matrix_shape
from .quantized import dense_array
from .sites import Site, check_weight


Axes = Callable[[str, Any], MatrixSpec | None]


def array_site(path: str, array: Any, axes: Axes | None) -> Site:
    """The site of an array, its axes told by a rule where there is one."""
    spec = None if axes is None else axes(path, array)
    if spec is not None and not isinstance(spec, MatrixSpec):
        raise TypeError(
            f"axes= must answer with an lrjax.MatrixSpec or None, got {spec!r} for "
            f"{path or 'the root'}."
        )
    if spec is not None:
        return ArraySite(path, array, spec=spec, told=spec)
    if array.ndim == 1:
        return VectorSite(path, array)
    if array.ndim == 2:
        spec = MatrixSpec(rows=(1,), cols=(0,)) if is_input_first(path) else MatrixSpec()
    return ArraySite(path, array, spec=spec)


@dataclasses.dataclass(frozen=True)
class ArraySite(Site):
    """An array, whose call is not known: adapting it replaces it by its dense sum."""

    spec: MatrixSpec | None = None
    told: MatrixSpec | None = None  # what the rule said, to be remembered

    kind = "array"

    def check(self) -> None:
        """Refuse an array of more than two axes that no rule speaks of."""
        check_weight(self.path, self.layer)
        matrix_shape(self.layer.shape, self._leaf.spec)

    @property
    def _leaf(self) -> MatrixLeaf:
        if self.spec is None:
            raise ValueError(
                f"{self.path or 'the root'} of shape {self.layer.shape} has "
                f"{self.layer.ndim} axes, and which of them make the matrix is not told. "
                "Pass axes=lambda path, array: lrjax.MatrixSpec(rows=…, cols=…), with the "
                "output axes as rows and the input axes as columns (the others stack "
                "layers, heads or experts), or leave it out with where=."
            )
        return MatrixLeaf(self.path, 0, self.spec, tuple(self.layer.shape))

    @property
    def kernel_shape(self):
        """The sizes of the axes that the rule calls rows and columns."""
        _, rows, cols = matrix_axes(self.layer.ndim, self._leaf.spec)
        sizes = lambda axes: tuple(self.layer.shape[axis] for axis in axes)
        return self.shape[:1] if self._leaf.spec.blocks > 1 else sizes(rows), sizes(cols)

    @property
    def bias(self):
        """An array has none."""
        return None

    @property
    def acts(self) -> bool:
        """An array has no call."""
        return False

    def matrix(self):
        """The array with its stack axes first, outputs, inputs."""
        return self._leaf.view(dense_array(self.layer))

    def put(self, matrix, bias):
        """The array of another matrix."""
        del bias
        return self._leaf.restore(matrix.astype(self.layer.dtype))

    def parts(self):
        """Its matrices."""
        still = self.still
        of = lambda matrix: ArraySite(self.path, matrix, spec=MatrixSpec(), still=still)
        return self.matrix(), of

    def matrix_axes(self):
        """Its axes, where rows and columns are one each."""
        if self.is_quantized:
            return None
        batch, rows, cols = matrix_axes(self.layer.ndim, self._leaf.spec)
        if len(rows) + len(cols) + self._leaf.spec.blocks > 3:
            return None
        return self.layer, tuple(batch), rows[0], cols[0]

    def product(self, matrix, x):
        """Not known."""
        raise NotImplementedError

    def down(self, right, x):
        """Not known."""
        raise NotImplementedError

    def up(self, left, h):
        """Not known."""
        raise NotImplementedError


class VectorSite(ArraySite):
    """A bias, or the scale of a norm: a matrix with one column."""

    kind = "vector"

    def check(self) -> None:
        """Refuse what is no floating-point array."""
        check_weight(self.path, self.layer)

    @property
    def kernel_shape(self):
        """One input."""
        return self.layer.shape, (1,)

    def matrix(self):
        """One column."""
        return self.layer[:, None]

    def put(self, matrix, bias):
        """The vector."""
        del bias
        return matrix[:, 0].astype(self.layer.dtype)

    def matrix_axes(self):
        """It has no second axis."""
        return

    def parts(self):
        """A vector is no stack."""
        return self.layer, self.of
