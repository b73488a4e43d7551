import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float


def optimal_shrinkage(
    values: Float[Array, "*b k"], shape: tuple[int, int], noise: ArrayLike | None = None
) -> Float[Array, "*b k"]:
    """The best shrinkage of the singular values of a low-rank matrix in noise.

    For a matrix of the given shape, entries with noise of standard deviation σ, the one
    function of single singular values with the least squared error in the limit of large
    sides. With ``y = value/(σ √longer)`` and ``β = shorter/longer``,

        η(y) = sqrt((y² − β − 1)² − 4β)/y  where y > 1 + √β, else 0,

    times ``σ √longer``. What is left counts the directions that can be told from noise.

    Args:
        values: singular values; all of them, if the noise is not given.
        shape: ``(m, n)`` of the matrix.
        noise: σ. By default the median of the values over that of pure noise: right while
            at most a few are signal.

    Returns:
        The shape of ``values``.

    Raises:
        ValueError: if the noise is not given and ``values`` are not all of them.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> values = jnp.array([30.0, 12.0, 10.0])
        >>> print(lrjax.linalg.optimal_shrinkage(values, (25, 100), noise=1.0).round(2))
        [25.62  0.    0.  ]

    Reference:
        M. Gavish, D. L. Donoho, "Optimal shrinkage of singular values" (2017), arXiv
        1405.7511; the median: M. Gavish, D. L. Donoho, "The optimal hard threshold for
        singular values is 4/√3" (2014), arXiv 1305.5870.
    """
    short, long = min(shape), max(shape)
    beta = short / long
    if noise is None:
        if values.shape[-1] != short:
            raise ValueError(
                f"without noise= all {short} singular values of a matrix of shape {shape} "
                f"are needed, got {values.shape[-1]}."
            )
        unit = jnp.median(values, axis=-1, keepdims=True) / _median_of_noise(beta)
    else:
        unit = jnp.asarray(noise, values.dtype) * long**0.5
    safe = jnp.where(unit > 0, unit, 1)
    square = (values / safe) ** 2
    above = square > (1 + beta**0.5) ** 2
    inside = jnp.where(above, (square - beta - 1) ** 2 - 4 * beta, 0)
    shrunk = jnp.sqrt(inside / jnp.where(above, square, 1)) * safe
    return jnp.where(unit > 0, jnp.where(above, shrunk, 0), values)


def _median_of_noise(beta: float) -> float:
    """The median singular value of noise of unit size, of the Marčenko-Pastur law."""
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    # x = low + (high − low) sin²(a) takes the roots at both ends away.
    a = (np.arange(20000) + 0.5) * (np.pi / 2 / 20000)
    x = low + (high - low) * np.sin(a) ** 2
    mass = np.cumsum((np.sin(a) * np.cos(a)) ** 2 / x)
    return float(np.sqrt(np.interp(0.5 * mass[-1], mass, x)))
