import jax.random as jr
from jaxtyping import ArrayLike, PRNGKeyArray

from ..linalg.gram import working_dtype
from ..lowrank import LowRank
from .problem import Problem


def small_init(
    problem: Problem,
    rank: int,
    scale: ArrayLike,
    *,
    key: PRNGKeyArray,
    symmetric: bool = False,
) -> LowRank:
    """A start near zero: Gaussian factors whose columns have the length ``scale``.

    ``left_ij ~ scale · N(0, 1/m)``, ``right_ij ~ scale · N(0, 1/n)``. From such a start
    gradient methods learn one singular direction after the other, which makes wide
    factors harmless: :func:`lrjax.subgm`, ``lrjax.scaled_gd(damping=…, relative=False)``.

    Args:
        problem: what to recover.
        rank: the width of the factors; up to ``min(m, n)`` is fine.
        scale: the expected length of a column.
        key: for the factors.
        symmetric: for symmetric problems: equal factors.

    Returns:
        The factors.

    Raises:
        ValueError: for a rank below 1.

    Example:
        >>> import jax, lrjax
        >>> problem = lrjax.matrix_sensing(jax.random.key(0), (90, 70), 2, 20)
        >>> x = lrjax.recovery.small_init(problem, 5, 1e-3, key=jax.random.key(1))
        >>> x.rank, bool(lrjax.norm(x) < 1e-5)
        (5, True)
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    (m, n), dtype = problem.shape, working_dtype(problem.targets.dtype)
    k_left, k_right = jr.split(key)
    left = scale * jr.normal(k_left, (m, rank), dtype) / m**0.5
    if symmetric:
        return LowRank(left, left)
    return LowRank(left, scale * jr.normal(k_right, (n, rank), dtype) / n**0.5)
