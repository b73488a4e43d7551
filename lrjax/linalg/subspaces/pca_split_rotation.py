import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ..._arguments import check_key
from .._numerics import check_rank, times, working_dtype
from ..decompositions import eigh
from ..orthonormalize import orthonormalize


def pca_split_rotation(
    c: Float[Array, "*b n n"], rank: int, *, key: PRNGKeyArray
) -> Float[Array, "*b n n"]:
    """A rotation whose first columns span the principal subspace of a second moment.

    ``Q = [V_r R_1, V_⊥ R_2]`` with the eigenvectors ``[V_r, V_⊥]`` of C, those of the
    largest values first, and random orthogonal R. So the first r coordinates ``Qᵀx`` hold
    most of the energy that r numbers can, uncorrelated with the others, and inside of both
    blocks it is spread evenly: no number is an outlier for a quantizer, which gives the
    first block more bits. A layer stays what it is: ``W x = (W Q)(Qᵀx)``.

    Args:
        c: the second moment of the inputs, ``(*b, n, n)``, symmetric.
        rank: the width of the first block.
        key: for both rotations, the same of every matrix of a batch.

    Returns:
        ``(*b, n, n)`` orthogonal, in float32 or wider. Not differentiated through.

    Raises:
        ValueError: for a rank that is not between 1 and n.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> c = jnp.diag(jnp.array([9.0, 0.1, 4.0, 0.1]))
        >>> q = lrjax.linalg.pca_split_rotation(c, 2, key=jax.random.key(0))
        >>> print(jnp.trace((q.T @ c @ q)[:2, :2]).round(3))
        13.0

    Reference:
        U. Saxena, S. Sharify, K. Roy, X. Wang, "ResQ: mixed-precision quantization of large
        language models with low-rank residuals" (2024), arXiv 2412.14363.
    """
    check_key("pca_split_rotation", key)
    check_rank(rank, c.shape)
    vectors = eigh(lax.stop_gradient(c).astype(working_dtype(c.dtype)))[1][..., ::-1]
    blocks = (vectors[..., :rank], vectors[..., rank:])
    turned = [_turned(x, k) for x, k in zip(blocks, jr.split(key), strict=True)]
    return jnp.concatenate(turned, axis=-1)


def _turned(basis: Array, key: PRNGKeyArray) -> Array:
    size = basis.shape[-1]
    if not size:
        return basis
    turn = orthonormalize(jr.normal(key, (size, size), basis.dtype))
    return times(basis, turn[(None,) * (basis.ndim - 2)])
