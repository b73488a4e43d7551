import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._arguments import checks_trees
from .._tree import check_has_nodes, check_params, map_factors
from ..linalg import nonzero, working_dtype
from ._common import on_nodes


@checks_trees
def subgm(
    learning_rate: optax.ScalarOrSchedule = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """The subgradient method from a small start: robust, for factors of any width.

    Each factor moves along its subgradient by a given share of its own length::

        left ← left − η_t ‖left‖ G_l/‖G_l‖        right ← right − η_t ‖right‖ G_r/‖G_r‖

    From factors of a tiny size (:func:`lrjax.lowrank.small_init`) the directions of the
    truth grow by a factor ``1 + η`` a step and those of the outliers far slower, as the
    subgradient of the l1 loss points to the truth up to a small error. So the surplus
    columns stay small, however many there are, and neither the rank nor the share of
    outliers has to be known. When the growth is over, ``η_t`` has to decay geometrically::

        optax.exponential_decay(0.1, 1, 0.97, transition_begin=growth)

    where ``growth`` is about ``log(size/start size)/log(1 + η)`` steps.

    Args:
        learning_rate: ``η``, relative to the size of the factors; a number or a schedule.

    Returns:
        An optax optimizer. A factor that is zero stays zero; leaves that are no LowRank
        nodes take plain gradient steps.

    Raises:
        ValueError: in ``update``, without ``params``.

    Example:
        >>> import jax, lrjax, optax
        >>> key = jax.random.key(0)
        >>> problem = lrjax.matrix_sensing(key, (9, 7), 1, 400, outlier_fraction=0.2)
        >>> start = lrjax.lowrank.small_init(problem.shape, 7, 1e-3, key=key)
        >>> rate = optax.exponential_decay(0.1, 1, 0.97, transition_begin=80)
        >>> solution = lrjax.solve(problem, lrjax.subgm(rate), start, steps=400)
        >>> bool(problem.relative_error(solution.x) < 1e-3)
        True

    Reference:
        J. Ma, S. Fattahi, "Global convergence of sub-gradient method for robust matrix
        recovery: small initialization, noisy measurements, and over-parameterization"
        (2022), arXiv 2202.08788.
    """

    def init(params):
        check_has_nodes("subgm", params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("subgm", params)
        return map_factors(_as_long_as, updates, params), state

    return optax.chain(
        on_nodes(optax.GradientTransformation(init, update)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _as_long_as(gradient: Array, factor: Array) -> Array:
    """The gradient, scaled to the length of the factor."""
    factor, gradient = (x.astype(working_dtype(x.dtype)) for x in (factor, gradient))
    length = jnp.linalg.norm(gradient, axis=(-2, -1), keepdims=True)
    wanted = jnp.linalg.norm(factor, axis=(-2, -1), keepdims=True)
    return gradient * (wanted / nonzero(length))
