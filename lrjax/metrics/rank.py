import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import linalg
from ..linalg import nonzero, working_dtype
from ..lowrank import LowRank, svd


def singular_values(x: LowRank | Float[Array, "*batch m n"]) -> Float[Array, "*batch k"]:
    """The singular values, in O((m + n) r²) for a factorized matrix.

    Args:
        x: a :class:`lrjax.LowRank` or a dense matrix; stacks allowed.

    Returns:
        ``(*batch, k)`` in descending order; ``k`` is the width, or ``min(m, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.singular_values(jnp.diag(jnp.array([1.0, 3.0]))))
        [3. 1.]
    """
    if isinstance(x, LowRank):
        core = svd(x).core
        return jnp.diagonal(core, axis1=-2, axis2=-1)
    return linalg.singular_values(x.astype(working_dtype(x.dtype)))


def stable_rank(x: LowRank | Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """The stable rank ``‖X‖_F² / ‖X‖₂²``: at most the rank, and blind to small values.

    Args:
        x: a :class:`lrjax.LowRank` or a dense matrix; stacks allowed.

    Returns:
        ``(*batch,)``; zero for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.stable_rank(jnp.diag(jnp.array([2.0, 2.0, 0.002]))))
        2.000001
    """
    relative = _relative(singular_values(x))
    return jnp.sum(relative**2, axis=-1)


def effective_rank(x: LowRank | Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """The effective rank: the exponential of the entropy of the singular values.

    With ``p_i = σ_i / Σσ`` it is ``exp(−Σ p_i ln p_i)``: k for k equal singular values.

    Args:
        x: a :class:`lrjax.LowRank` or a dense matrix; stacks allowed.

    Returns:
        ``(*batch,)``; zero for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.effective_rank(jnp.eye(3)).round(4))
        3.0

    Reference:
        O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality"
        (2007), EUSIPCO.
    """
    relative = _relative(singular_values(x))
    total = jnp.sum(relative, axis=-1, keepdims=True)
    p = relative / nonzero(total)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def _relative(values: Array) -> Array:
    """Singular values over the largest; so that no square overflows or vanishes."""
    largest = values[..., :1]
    return values / nonzero(largest)
