import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._numerics import check_rank, times, working_dtype
from .svd_and_eigh import eigh, svd
from .truncated_svd import TruncatedSVD


def weighted_svd(
    d: Float[Array, "*b m n"],
    c_left: Float[Array, "*b m m"] | None,
    c_right: Float[Array, "*b n n"] | None,
    rank: int,
) -> TruncatedSVD:
    """The best approximation of a rank where errors are weighed on both sides.

    ``X = left diag(values) rightᵀ`` minimizes ``tr(C_l E C_r Eᵀ)`` of ``E = D − X``. With
    ``C_r`` the second moment of the inputs of a layer and ``C_l = I`` that is the mean
    squared error of its outputs; then ``X`` is also D behind the leading principal
    components of the outputs, the eigenvectors of ``D C_r Dᵀ``.

    With ``D = I``, ``C_r`` of activations x and ``C_l`` of the gradients g at them, ``y =
    Σ^½ rightᵀ x`` is the basis in which both have the second moment Σ, as ``x ≈ left Σ^½
    y``: directions in order of how much they vary and matter.

    From ``C_l^½ D C_r^½ = P Σ Rᵀ``: ``left = C_l^(−½) P``, ``right = C_r^(−½) R``, the
    values those of Σ, and the error the root of the sum of squares of those left out.
    Where C has no weight the result is zero.

    Args:
        d: ``(*b, m, n)``.
        c_left: symmetric and positive semidefinite, or ``None`` for the identity.
        c_right: likewise.
        rank: the number of triplets.

    Returns:
        ``left (*b, m, rank)``, ``values (*b, rank)`` in descending order and
        ``right (*b, n, rank)``, in float32 or wider. Not differentiated through.

    Raises:
        ValueError: for a rank out of range, or weights of another size than ``d``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> inputs = jnp.diag(jnp.array([0.01, 25.0]))
        >>> fit = lrjax.linalg.weighted_svd(jnp.eye(2), None, inputs, 1)
        >>> print((fit.left @ jnp.diag(fit.values) @ fit.right.T).round(4) + 0.0)
        [[0. 0.]
         [0. 1.]]

    Reference:
        S.-Y. Liu et al., "EoRA: fine-tuning-free compensation for compressed LLM with
        eigenspace low-rank approximation" (2024), arXiv 2410.21271; A. Kaushal,
        T. Vaidhya, I. Rish, "LORD: low rank decomposition of monolingual code LLMs for
        one-shot compression" (2023), arXiv 2309.14021; of activations: L. Bushnaq et al.,
        "The local interaction basis: identifying computationally-relevant and sparsely
        interacting features in neural networks" (2024), arXiv 2405.10928.
    """
    check_rank(rank, d.shape)
    d = lax.stop_gradient(d).astype(working_dtype(d.dtype))
    for name, c, size in (
        ("c_left", c_left, d.shape[-2]),
        ("c_right", c_right, d.shape[-1]),
    ):
        if c is not None and c.shape[-2:] != (size, size):
            raise ValueError(
                f"weighted_svd of a matrix {d.shape} needs {name} of shape {(size, size)}, "
                f"got {c.shape}."
            )
    left_root, left_inverse = _roots(c_left, d.dtype)
    right_root, right_inverse = _roots(c_right, d.dtype)
    weighed = d if left_root is None else times(left_root, d)
    weighed = weighed if right_root is None else times(weighed, right_root)
    u, values, vt = svd(weighed)
    u, v = u[..., :rank], vt.mT[..., :rank]
    left = u if left_inverse is None else times(left_inverse, u)
    right = v if right_inverse is None else times(right_inverse, v)
    return TruncatedSVD(left, values[..., :rank], right)


def _roots(c: Array | None, dtype) -> tuple[Array, Array] | tuple[None, None]:
    """The root of a metric and its pseudo-inverse."""
    if c is None:
        return None, None
    values, vectors = eigh(lax.stop_gradient(c).astype(dtype))
    # Rounding leaves values of this size, of either sign, where there is no weight.
    floor = jnp.finfo(dtype).eps * c.shape[-1] * values[..., -1:]
    heavy = values > floor
    root = jnp.where(heavy, jnp.sqrt(jnp.where(heavy, values, 1)), 0)
    inverse = jnp.where(heavy, 1 / jnp.where(heavy, root, 1), 0)
    spread = lambda x: times(vectors * x[..., None, :], vectors.mT)
    return spread(root), spread(inverse)
