import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ... import linalg
from ...linalg import nonzero, working_dtype
from ...lowrank import LowRank, SVDForm, svd


Matrix = LowRank | SVDForm | Float[Array, "*batch m n"]


def singular_values(x: Matrix) -> Float[Array, "*batch k"]:
    """The singular values, in O((m + n) r²) for a factorized matrix.

    Args:
        x: a matrix in factors or dense; stacks allowed.

    Returns:
        ``(*batch, k)`` in descending order; ``k`` is the width, or ``min(m, n)``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.singular_values(jnp.diag(jnp.array([1.0, 3.0]))))
        [3. 1.]
    """
    if isinstance(x, LowRank | SVDForm):
        core = svd(x).core
        return jnp.diagonal(core, axis1=-2, axis2=-1)
    return linalg.singular_values(x.astype(working_dtype(x.dtype)))


def stable_rank(x: Matrix) -> Float[Array, "*batch"]:
    """The stable rank ``‖X‖_F² / ‖X‖₂²``: at most the rank, and blind to small values.

    Args:
        x: a matrix in factors or dense; stacks allowed.

    Returns:
        ``(*batch,)``; zero for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.stable_rank(jnp.diag(jnp.array([2.0, 2.0, 0.002]))))
        2.000001
    """
    relative = _relative(singular_values(x))
    return jnp.sum(relative**2, axis=-1)


def effective_rank(x: Matrix) -> Float[Array, "*batch"]:
    """The effective rank: the exponential of the entropy of the singular values.

    With ``p_i = σ_i / Σσ`` it is ``exp(−Σ p_i ln p_i)``: k for k equal singular values.

    Args:
        x: a matrix in factors or dense; stacks allowed.

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


def nuclear_rank(x: Matrix) -> Float[Array, "*batch"]:
    """The nuclear over the spectral norm, ``Σσ / σ_1``: between the stable and the rank.

    Args:
        x: a matrix in factors or dense; stacks allowed.

    Returns:
        ``(*batch,)``; zero for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.nuclear_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))))
        2.0
    """
    return jnp.sum(_relative(singular_values(x)), axis=-1)


def participation_ratio(x: Matrix) -> Float[Array, "*batch"]:
    """How many directions share the energy: ``(Σσ²)² / Σσ⁴``, k for k equal values.

    Of a matrix of centred samples it is the participation ratio of their covariance.

    Args:
        x: a matrix in factors or dense; stacks allowed.

    Returns:
        ``(*batch,)``; zero for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.participation_ratio(jnp.diag(jnp.array([1.0, 1.0, 0.0]))))
        2.0
    """
    squares = _relative(singular_values(x)) ** 2
    fourth = jnp.sum(squares**2, axis=-1)
    return jnp.sum(squares, axis=-1) ** 2 / nonzero(fourth)


def energy_rank(x: Matrix, energy: ArrayLike = 0.9) -> Int[Array, "*batch"]:
    """The fewest singular values that hold a share of the energy ``Σσ²``.

    Args:
        x: a matrix in factors or dense; stacks allowed.
        energy: the share, in (0, 1].

    Returns:
        ``(*batch,)``; zero for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.energy_rank(jnp.diag(jnp.array([3.0, 1.0, 0.1])), 0.95))
        2
    """
    squares = _relative(singular_values(x)) ** 2
    # What is left after the first k, summed from the small end: no small share is lost.
    after = jnp.flip(jnp.cumsum(jnp.flip(squares, -1), axis=-1), -1)
    rest = 1 - jnp.asarray(energy, squares.dtype)
    allowed = jnp.maximum(rest, jnp.finfo(squares.dtype).eps) * after[..., :1]
    return jnp.sum(after > allowed, axis=-1)


def numerical_rank(x: Matrix, tol: ArrayLike | None = None) -> Int[Array, "*batch"]:
    """How many singular values are above ``tol σ_1``, by default above rounding.

    Args:
        x: a matrix in factors or dense; stacks allowed.
        tol: relative to the largest; by default ``eps max(m, n)`` of the dtype.

    Returns:
        ``(*batch,)``; zero for the zero matrix.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> print(lrjax.metrics.numerical_rank(jnp.ones((4, 3))))
        1
    """
    relative = _relative(singular_values(x))
    rounding = float(jnp.finfo(x.dtype).eps) * max(x.shape[-2:])
    return jnp.sum(relative > jnp.asarray(rounding if tol is None else tol), axis=-1)


def _relative(values: Array) -> Array:
    """Singular values over the largest; so that no square overflows or vanishes."""
    largest = values[..., :1]
    return values / nonzero(largest)
