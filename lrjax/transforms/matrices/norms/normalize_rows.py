from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, PyTree

from ...._arguments import checks_trees
from ...._matrices import Where, map_init, map_matrices
from ....linalg import nonzero, working_dtype
from ._layers import layer_norm


class NormalizeRowsState(NamedTuple):
    """The state of :func:`normalize_rows`.

    Attributes:
        squares: the averaged mean squares ``(*b, m, 1)`` of the rows of each chosen leaf,
            ``optax.MaskedNode()`` for each other one.
    """

    squares: PyTree


@checks_trees
def normalize_rows(
    b2: ArrayLike = 0.95, eps: ArrayLike = 1e-8, *, where: Where | None = None
) -> optax.GradientTransformation:
    """Divide the rows of each matrix by their running sizes, at the same norm altogether.

    ``v_i ← b2 v_i + (1−b2) mean_j U_ij²``, ``N_ij = U_ij / (√v_i + ε)`` and
    ``U ← N ‖U‖_F / ‖N‖_F`` for a matrix ``U (m, n)``: ``m`` numbers of state. A row that
    is all zero was not updated, and its average waits. There is no correction of the bias
    of a young average: the last line undoes it where all rows have the same age.

    Args:
        b2: decay of the averages.
        eps: added to their roots.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat, and which axes are rows; leading axes are a stack of matrices.
            By default matrices but embeddings and heads. The others pass unchanged.

    Returns:
        The transform.

    Raises:
        ValueError: at ``init``, if ``where`` chooses no leaf, or one that is no matrix.
        TypeError: for complex leaves.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.normalize_rows(where=lambda path, shape: True)
        >>> u = jnp.array([[4.8, 6.4], [2.0, 2.0], [0.0, 0.0]])
        >>> u, state = tx.update(u, tx.init(u))
        >>> print(jnp.linalg.norm(u, axis=1).round(4))
        [6. 6. 0.]

    Reference:
        Z. Li, L. Liu, C. Liang, W. Chen, T. Zhao, "NorMuon: making Muon more efficient
        and scalable" (2025), arXiv 2510.05491. Special case: with ``b2=0`` all rows that
        are not zero get the same norm.
    """

    def init(params):
        def start(leaf, x):
            # By a mean, which keeps a sharding of the rows.
            zeros = jnp.zeros_like(leaf.view(x), working_dtype(x.dtype))
            return (jnp.mean(zeros, axis=-1, keepdims=True),)

        return NormalizeRowsState(*map_init("normalize_rows", where, start, params, 1))

    def update(updates, state, params=None):
        del params

        def one(leaf, u, old):
            out, new = _normalize(leaf.view(u), old, b2, eps)
            return leaf.restore(out, u), new

        out, squares = map_matrices("normalize_rows", where, one, updates, state.squares)
        return out, NormalizeRowsState(squares)

    return optax.GradientTransformation(init, update)


def _normalize(u: Array, old: Array, b2: ArrayLike, eps: ArrayLike) -> tuple[Array, Array]:
    wide = u.astype(old.dtype)
    square = jnp.mean(wide**2, axis=-1, keepdims=True)
    new = jnp.where(square > 0, b2 * old + (1 - b2) * square, old).astype(old.dtype)
    out = wide / (jnp.sqrt(new) + eps)
    return (out * (layer_norm(wide) / nonzero(layer_norm(out)))).astype(u.dtype), new
