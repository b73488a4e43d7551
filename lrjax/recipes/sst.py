from typing import Any

import jax
import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .._arguments import checks_trees
from ..lowrank import SVDForm
from ..transforms import sample_directions


@checks_trees
def sst(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    period: int | Array = 200,
    refactor_every: int | Array = 2000,
    inner: optax.GradientTransformation | None = None,
    warmup: ArrayLike = 20,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SST: all singular values in every step, a sampled few of the singular vectors.

    Weights are ``U diag(σ) Vᵀ`` of full width, an SVDForm of their own SVD; there is no
    dense copy and no gradient of one. All ``σ`` move in every step, of ``U`` and ``V`` the
    ``rank`` columns that are drawn every ``period`` steps, along gradients without the
    factor σ. :func:`lrjax.sample_directions` says how.

    Args:
        learning_rate: a number or a schedule.
        rank: how many singular vectors of each side are trained at a time; None stands
            for 16.
        period: steps from one draw to the next; may be traced.
        refactor_every: steps from one SVD of the weights to the next; may be traced.
        inner: from gradients to directions, of all leaves; Adam by default. For nodes its
            moments start anew with every draw.
        warmup: in how many steps after a draw the rate of nodes rises to what it is.
        key: of the draws.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without an SVDForm it is ``inner``
        with a learning rate.

    Raises:
        ValueError: as :func:`lrjax.sample_directions`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.svd(jax.random.normal(jax.random.key(0), (3, 3)))
        >>> tx = lrjax.sst(0.03, 1, period=20, refactor_every=60, warmup=2)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state, first = tx.init(x), loss(x)
        >>> for _ in range(200):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < first / 10)
        True

    Reference:
        J. Zhao, Y. Zhang, X. Li, H. Liu, C. V. Cannistraci, "Sparse spectral training and
        inference on Euclidean and hyperbolic neural networks" (2024), arXiv 2405.15481.
    """
    tx = optax.scale_by_adam() if inner is None else inner
    directions = sample_directions(
        learning_rate,
        16 if rank is None else rank,
        period=period,
        refactor_every=refactor_every,
        inner=tx,
        warmup=warmup,
        key=key,
    )
    plain = optax.chain(tx, optax.scale_by_learning_rate(learning_rate))
    return optax.chain(optax.masked(plain, _others), directions)


def _others(tree: Any) -> Any:
    is_form = lambda x: isinstance(x, SVDForm)
    return jax.tree.map(lambda x: not is_form(x), tree, is_leaf=is_form)
