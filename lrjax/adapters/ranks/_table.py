"""All masks as one table: a row for each matrix, those of a stack apart."""

import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..kinds.factors import Factors
from ..protocol import Adapters, map_adapters
from .masks import factors_of, map_factors


class Table:
    """Rows of numbers for the columns of adapters, in the order of their paths.

    Attributes:
        shapes: ``{path: (*b, r)}`` of the adapters with a mask.
        exists: ``(rows, widest r)``, which entries are columns.
        mask: of the same shape.
    """

    def __init__(self, function: str, adapters: Adapters):
        found = {path: factors_of(a) for path, a in adapters.layers.items()}
        self.factors: dict[str, Factors] = {
            path: nodes[0]
            for path, nodes in sorted(found.items())
            if nodes and nodes[0].mask is not None
        }
        if not self.factors:
            raise ValueError(
                f"{function} found no adapter with a mask: give it all adapters, no half "
                "of a partition, after lrjax.adapters.with_ranks or of a kind with a mask."
            )
        masks = {path: jnp.asarray(node.mask) for path, node in self.factors.items()}
        self.shapes = {path: mask.shape for path, mask in masks.items()}
        whole = {path: jnp.ones(mask.shape, bool) for path, mask in masks.items()}
        self.exists: Bool[Array, "rows r"] = self.of(whole)
        self.mask: Float[Array, "rows r"] = self.of(masks)

    def of(self, values: dict[str, Array]) -> Array:
        """``{path: (*b, r)}`` as a table; zeros where there is no column."""
        width = max(shape[-1] for shape in self.shapes.values())
        rows = []
        for path, (*_, r) in self.shapes.items():
            flat = values[path].reshape(-1, r)
            rows.append(jnp.pad(flat, ((0, 0), (0, width - r))))
        return jnp.concatenate(rows)

    def rows(self, values: dict[str, Array]) -> Array:
        """``{path: (*b,)}``, a number for each matrix, as ``(rows,)``."""
        return jnp.concatenate([values[path].reshape(-1) for path in self.shapes])

    def apart(self, table: Array) -> dict[str, Array]:
        """A table as ``{path: (*b, r)}``."""
        found, start = {}, 0
        for path, (*batch, r) in self.shapes.items():
            count = math.prod(batch)
            found[path] = table[start : start + count, :r].reshape(*batch, r)
            start += count
        return found

    def put(
        self,
        adapters: Adapters,
        mask: Array,
        change: Callable[[str, Factors], Factors] = lambda path, factors: factors,
    ) -> Adapters:
        """The adapters with other masks, and what else ``change`` makes of them."""
        masks = self.apart(mask)

        def one(path, adapter):
            if path not in masks:
                return adapter
            new = lambda node: change(
                path,
                eqx.tree_at(lambda a: a.mask, node, masks[path].astype(node.mask.dtype)),
            )
            return map_factors(new, adapter)

        return map_adapters(one, adapters)
