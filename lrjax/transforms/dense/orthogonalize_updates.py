from typing import Literal

import optax

from ...linalg import polar
from ...linalg.polar import check_method
from ...subspaces.view import is_hidden_matrix
from ..subspace._leaves import Where, choose


def orthogonalize_updates(
    method: Literal["cubic", "muon", "polar_express", "gram", "svd"] = "polar_express",
    *,
    steps: int | None = None,
    where: Where = is_hidden_matrix,
) -> optax.GradientTransformation:
    """Replace each matrix by its polar factor: all of its singular values become one.

    ``G = U Σ Vᵀ (m, n)`` becomes ``U Vᵀ``. No momentum and no scale: Muon is this between
    ``optax.trace(0.95, nesterov=True)`` and a learning rate times ``√max(1, m/n)``.

    Args:
        method: how; see :func:`lrjax.linalg.polar`. ``"muon"`` is cheaper and leaves the
            singular values in ``[0.68, 1.13]``.
        steps: iterations, where the method has any and not its own number.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to treat; leading axes are a stack of matrices. By default matrices
            but embeddings and heads. The others pass unchanged.

    Returns:
        A stateless optax transform.

    Raises:
        ValueError: for an unknown method; in ``init``, if ``where`` chooses no leaf, or
            one that is no matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.orthogonalize_updates("svd", where=lambda path, shape: True)
        >>> g = jnp.array([[3.0, 0.0], [0.0, -0.1]])
        >>> print(tx.update(g, tx.init(g))[0])
        [[ 1.  0.]
         [ 0. -1.]]

    Reference:
        K. Jordan et al., "Muon" (2024). Special case: :func:`lrjax.scale_by_smooth_polar`
        with ``beta=0``.
    """
    check_method(method, steps)
    find = lambda tree: choose("orthogonalize_updates", tree, where)

    def init(params):
        find(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        leaves, values, treedef = find(updates)

        def one(leaf, g):
            if leaf is None:
                return g
            return leaf.restore(polar(leaf.view(g), method=method, steps=steps))

        return treedef.unflatten(map(one, leaves, values)), state

    return optax.GradientTransformation(init, update)
