from jaxtyping import Array, Float

from .._numerics import times, working_dtype
from .svd_and_eigh import svd


def procrustes(overlap: Float[Array, "*b r s"]) -> Float[Array, "*b r s"]:
    """The solution of the orthogonal Procrustes problem, from the overlap ``XᵀY``.

    ``Q = U Vᵀ`` of ``XᵀY = U Σ Vᵀ``: the orthogonal matrix that brings ``X Q`` nearest to
    ``Y`` in the Frobenius norm. It maximizes ``tr(Qᵀ XᵀY)``, so that overlaps of several
    pairs add up. With both factors of the SVD it is orthogonal always, where
    :func:`lrjax.linalg.polar` has zeros: directions in which X and Y share nothing are
    turned in some way.

    Args:
        overlap: square matrices ``(*b, r, r)``.

    Returns:
        Orthogonal matrices of the same shape, in float32 or wider.

    Raises:
        ValueError: if the overlap is not square.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[0.0, 3.0], [-1.0, 0.0]])
        >>> print(lrjax.linalg.procrustes(x.T @ y) + 0.0)
        [[ 0.  1.]
         [-1.  0.]]

    Reference:
        P. H. Schönemann, "A generalized solution of the orthogonal Procrustes problem"
        (1966), Psychometrika.
    """
    if overlap.shape[-1] != overlap.shape[-2]:
        raise ValueError(
            f"procrustes needs a square overlap xᵀ y, got shape {overlap.shape}: give both "
            "sides the same number of columns."
        )
    u, _, vt = svd(overlap.astype(working_dtype(overlap.dtype)))
    return times(u, vt)
