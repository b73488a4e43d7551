import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike

from ...._arguments import checks_trees
from ...._matrices import check_real
from ...._sharding import placed_like
from ....linalg import eigh, gram, nonzero, outer, times
from ..._checks import check_non_negative


@checks_trees
def scale_by_smooth_polar(beta: ArrayLike) -> optax.GradientTransformation:
    """Flatten the singular values of every matrix of a tree, smoothly at zero.

    ``G = U diag(g) Vᵀ`` becomes ``U diag(g / sqrt(g² + β²)) Vᵀ``: about 1 for singular
    values above β, linear below. With β → 0 it is the polar factor (the matrix sign),
    whose flow is discontinuous: where a singular value has been driven to zero it
    chatters. The cost of integrating the flow grows as 1/β. Matrices are the last two
    axes; each factor of a LowRank node counts as one. Scalars and vectors pass unchanged.

    Args:
        beta: β, in the units of the gradient. It never goes below the rounding error of
            the largest singular value, so 0 is safe.

    Returns:
        A stateless optax transform.

    Raises:
        ValueError: for a negative ``beta``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.scale_by_smooth_polar(3.0)
        >>> step, _ = tx.update(jnp.diag(jnp.array([4.0, 0.0])), tx.init(None))
        >>> print(step.round(4))
        [[0.8 0. ]
         [0.  0. ]]

    Reference:
        C. Kang, J. Yun, B. Shin, Y. Cho, C. Yun, "Uniform spectral growth and convergence
        of Muon in LoRA-style matrix factorization" (2026), arXiv 2602.06385; unsmoothed:
        K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
        (2024), kellerjordan.github.io/posts/muon.
    """
    check_non_negative("scale_by_smooth_polar", "beta", beta)

    def init(params):
        check_real("scale_by_smooth_polar", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        flatten = lambda g: _smooth_polar(g, beta) if jnp.ndim(g) >= 2 else g
        return jax.tree.map(flatten, updates), state

    return optax.GradientTransformation(init, update)


def _smooth_polar(g: Array, beta: ArrayLike) -> Array:
    if g.shape[-2] < g.shape[-1]:
        return _smooth_polar(g.mT, beta).mT
    values, vectors = eigh(gram(g))
    floor = values.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    square = jnp.maximum(values, 0) + jnp.maximum(jnp.square(beta), floor)
    root = jnp.where(square > 0, lax.rsqrt(nonzero(square)), 0)
    inverse_root = outer(vectors * root[..., None, :], vectors)
    flat = times(g.astype(root.dtype), inverse_root)
    return placed_like(flat.astype(g.dtype), g)
