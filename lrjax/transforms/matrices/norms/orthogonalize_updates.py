from typing import Literal

import optax

from ...._arguments import checks_trees
from ...._matrices import Where, map_matrices
from ....linalg import check_polar_method, polar, products_at


@checks_trees
def orthogonalize_updates(
    method: Literal["cubic", "muon", "polar_express", "gram", "svd"] = "polar_express",
    *,
    steps: int | None = None,
    where: Where | None = None,
    precision: str | None = None,
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
        precision: of the products, as ``jax.default_matmul_precision``
            takes it; None for the one in force, see :func:`lrjax.project_updates`.

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
        K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
        (2024), kellerjordan.github.io/posts/muon. Special case:
        :func:`lrjax.scale_by_smooth_polar` with ``beta=0``.
    """
    check_polar_method(method, steps)
    find = lambda f, tree: map_matrices("orthogonalize_updates", where, f, tree)[0]

    def init(params):
        find(lambda leaf, x: (x,), params)  # refuses what is no matrix
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params

        def one(leaf, g):
            with products_at(precision, g.dtype):
                u = polar(leaf.view(g), method=method, steps=steps, precision=None)
            return (leaf.restore(u, g),)

        return find(one, updates), state

    return optax.GradientTransformation(init, update)
