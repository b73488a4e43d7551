import optax
from jaxtyping import Array, ArrayLike

from .._arguments import checks_trees
from ..transforms import add_hierarchical_lasso, prune_columns
from ._common import on_nodes


@checks_trees
def maestro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    strength: ArrayLike = 1e-4,
    threshold: ArrayLike = 1e-5,
    period: int | Array = 100,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Maestro: factors of full width whose columns order themselves, and lose the last.

    For ``X = left @ right.T`` of a loss at ``sample_prefix(params, key=…)``: in each step
    one layer is cut to a random number of its first columns. A hierarchical lasso,
    :func:`lrjax.add_hierarchical_lasso`, makes the last ones small, and every ``period``
    steps, an epoch say, :func:`lrjax.prune_columns` takes away those that are. Start from
    a dense start in balanced factors, ``lrjax.truncate(weight, min(weight.shape))``.

    Args:
        learning_rate: a number or a schedule.
        strength: of the lasso, from 1e-6 to 5e-3 in the paper.
        threshold: importance below which columns go.
        period: of the pruning; may be traced.
        inner: transform of the gradients of factors and of all other leaves; momentum 0.9
            by default.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without a LowRank node it is
        ``inner`` with a learning rate.

    Raises:
        ValueError: for a negative strength, or a period below 1.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 0.01]))
        >>> params = lrjax.truncate(jax.random.normal(jax.random.key(0), (3, 3)), 3)
        >>> def loss(params, key):
        ...     x = lrjax.transforms.sample_prefix(params, key=key)
        ...     return jnp.sum((x.materialize() - target) ** 2)
        >>> tx = lrjax.maestro(0.003, strength=0.05, threshold=0.1, period=50)
        >>> @jax.jit
        ... def step(carry, key):
        ...     params, state = carry
        ...     updates, state = tx.update(jax.grad(loss)(params, key), state, params)
        ...     return (optax.apply_updates(params, updates), state), None
        >>> keys = jax.random.split(jax.random.key(1), 1000)
        >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        >>> print(lrjax.lowrank.columns_in_use(params))
        2

    Reference:
        S. Horváth, S. Laskaridis, S. Rajput, H. Wang, "Maestro: uncovering low-rank
        structures via trainable decomposition" (2023), arXiv 2308.14929.
    """
    return optax.chain(
        on_nodes(add_hierarchical_lasso(strength)),
        optax.trace(0.9) if inner is None else inner,
        optax.scale_by_learning_rate(learning_rate),
        on_nodes(prune_columns(threshold, period=period)),
    )
