from collections.abc import Callable

import optax
from jax import Array
from jaxtyping import ArrayLike, PRNGKeyArray, PyTree

from .._arguments import checks_trees
from ..transforms import hessian_product, scale_by_nystrom
from ._common import DecayMask, finish


@checks_trees
def sketchy_sgd(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    rank: int | None = None,
    *,
    damping: ArrayLike | None = None,
    refresh_every: int | Array = 100,
    product: Callable[[Callable, PyTree, PyTree], PyTree] = hessian_product,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SketchySGD: a low-rank sketch of the Hessian, and its own learning rate.

    ``η P⁻¹ g`` with ``P = U Λ Uᵀ + ρI`` and ``η = 1/(2 λ_max(P⁻¹H))``, both from products
    with the Hessian of a batch, :func:`lrjax.scale_by_nystrom`. For losses that are badly
    conditioned and nearly convex. The state has ``r`` numbers a parameter.

    Args:
        learning_rate: a number or a schedule, times ``η``: one is what the method asks for.
        rank: ``r``; None stands for 10.
        damping: ``ρ``; None for the smallest eigenvalue that is kept.
        refresh_every: steps between two sketches; an epoch is a good one.
        product: products with another curvature, as for :func:`lrjax.scale_by_nystrom`.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        key: source of the random numbers.

    Returns:
        An optax optimizer whose ``update`` needs ``params`` and ``value_fn``, the loss on
        a batch as a function of the parameters, and takes ``rate_fn``, that on another one.

    Raises:
        ValueError: as :func:`lrjax.scale_by_nystrom`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.sketchy_sgd(rank=2)
        >>> scales = jnp.diag(10.0 ** -jnp.arange(5.0))
        >>> x = jax.random.normal(jax.random.key(0), (40, 5)) @ scales
        >>> loss = lambda w: jnp.mean(jnp.logaddexp(0, x @ w) - (x[:, 0] > 0) * (x @ w))
        >>> step = jax.jit(lambda w, s: tx.update(jax.grad(loss)(w), s, w, value_fn=loss))
        >>> w = jnp.zeros(5)
        >>> state = tx.init(w)
        >>> for _ in range(20):
        ...     updates, state = step(w, state)
        ...     w = optax.apply_updates(w, updates)
        >>> print(loss(w) < 0.4)
        True

    Reference:
        Z. Frangella, P. Rathore, S. Zhao, M. Udell, "SketchySGD: reliable stochastic
        optimization via randomized curvature estimates" (2022), arXiv 2211.08597.
    """
    rank = 10 if rank is None else rank
    tx = scale_by_nystrom(
        rank, damping, refresh_every=refresh_every, product=product, key=key
    )
    return finish(tx, learning_rate, weight_decay, mask)
