from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ...subspaces.view import (
    MatrixSpec,
    Rank,
    as_matrices,
    from_matrices,
    matrix_shape,
    resolve_rank,
)


Where = Callable[[str, tuple[int, ...]], bool | MatrixSpec]


class Leaf(NamedTuple):
    """A leaf that a transform treats as matrices.

    Attributes:
        path: its path in the tree.
        index: its place among the chosen leaves. Leaves that are left alone do not
            count, so that a mask may hide them or not.
        spec: which axes make its matrices.
        shape: its shape.
    """

    path: str
    index: int
    spec: MatrixSpec
    shape: tuple[int, ...]

    @property
    def sides(self) -> tuple[int, int]:
        """The rows and columns of one matrix."""
        m, n = matrix_shape(self.shape, self.spec)[-2:]
        return m, n

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of the stack of matrices."""
        return matrix_shape(self.shape, self.spec)[:-2]

    def rank(self, rank: Rank) -> int:
        """The rank of this leaf."""
        return resolve_rank(rank, self.path, *self.sides)

    def view(self, x: Array) -> Float[Array, "*b m n"]:
        """The leaf as a batch of matrices."""
        return as_matrices(x, self.spec)

    def restore(self, x: Float[Array, "*b m n"]) -> Array:
        """Undo :meth:`view`."""
        return from_matrices(x, self.spec, self.shape)


def choose(
    function: str, tree: PyTree, where: Where
) -> tuple[list[Leaf | None], list[Any], Any]:
    """Which leaves of a tree are matrices to treat, all leaves, and the structure.

    Raises:
        ValueError: if ``where`` chooses a leaf that is no matrix, or none at all of a
            tree that has leaves.
    """
    flat, treedef = jtu.tree_flatten_with_path(tree)
    leaves: list[Leaf | None] = []
    chosen = 0
    for path, x in flat:
        name, shape = jtu.keystr(path), tuple(jnp.shape(x))
        spec = where(name, shape)
        if not spec:
            leaves.append(None)
            continue
        if len(shape) < 2:
            raise ValueError(
                f"where= chose {name or 'the root'} of shape {shape}, which is no matrix: "
                "return False for leaves with fewer than two axes."
            )
        spec = spec if isinstance(spec, MatrixSpec) else MatrixSpec()
        leaves.append(Leaf(name, chosen, spec, shape))
        chosen += 1
    if flat and not chosen:
        some = ", ".join(jtu.keystr(path) for path, _ in flat[:5])
        raise ValueError(
            f"{function} found no matrix to treat among {some}: the default where= skips "
            "vectors, small matrices, embeddings and heads. Pass where=lambda path, "
            "shape: … to choose."
        )
    return leaves, [x for _, x in flat], treedef
