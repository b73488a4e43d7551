import operator

import jax
import optax
from jaxtyping import Array, ArrayLike, PyTree

from .._arguments import checks_trees
from .._tree import named_factors
from ..transforms import cubic_schedule, freeze_factors
from ._common import DecayMask, finish, if_nodes


@checks_trees
def aflora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    begin: ArrayLike = 100,
    end: ArrayLike = 1000,
    window: int | Array = 10,
    b1: ArrayLike = 0.85,
    b2: ArrayLike = 0.95,
    inner: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.1,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """AFLoRA: factors stop one after the other, those first on which the loss hangs least.

    Adam, and :func:`lrjax.freeze_factors` with a fraction of numbers that falls from one at
    step ``begin`` to zero at step ``end`` with the third power. In the end no factor of a
    LowRank node moves, and what remains are the leaves between them. In the paper these are
    the vectors of ``diag(b) B diag(d) A``: that is :class:`lrjax.TiedLoRA` with a group for
    each layer, ``lambda path, site: lrjax.TiedLoRA(4, group=path)`` as the rule of
    :func:`lrjax.adapt`, but that B starts at zero there, and b not.

    Args:
        learning_rate: a number or a schedule; 1e-2 at rank 4 in the paper.
        begin: the first step at which a factor may stop: after one epoch in the paper.
        end: the step from which on all have, which depends on the length of the training:
            14 epochs before its end for small data sets in the paper, 7 for large ones.
        window: how many steps are averaged to one sample of the sensitivity; may be traced.
        b1: of the running average of samples.
        b2: of the running average of their deviations.
        inner: transform of the gradients, before decay and rate; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without a LowRank node it is
        ``inner`` with decay and a learning rate.

    Raises:
        ValueError: for a window below 1.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> factor = lambda size: jnp.arange(1.0, size + 1)[:, None]
        >>> params = {"pair": lrjax.LowRank(factor(4), factor(3)), "bias": jnp.ones(2)}
        >>> tx = lrjax.aflora(0.1, begin=2, end=6, window=2)
        >>> @jax.jit
        ... def step(params, state):  # of ½ ‖params‖²
        ...     updates, state = tx.update(params, state, params)
        ...     return optax.apply_updates(params, updates), state, updates
        >>> state = tx.init(params)
        >>> for _ in range(10):
        ...     params, state, updates = step(params, state)
        >>> print(*(jnp.any(x != 0) for x in jax.tree.leaves(updates)))  # bias, left, right
        True False False

    Reference:
        Z. Liu et al., "AFLoRA: adaptive freezing of low rank adaptation in parameter
        efficient fine-tuning of large models" (2024), arXiv:2403.13269. Special case: up to
        step ``begin`` it is ``inner``.
    """
    direction = optax.scale_by_adam() if inner is None else inner
    optimizer = finish(direction, learning_rate, weight_decay, mask)
    kept = cubic_schedule(1.0, 0.0, begin=begin, end=end)
    frozen = optax.masked(
        freeze_factors(optimizer, kept, window=window, b1=b1, b2=b2), _factors
    )
    rest = optax.masked(optimizer, lambda tree: jax.tree.map(operator.not_, _factors(tree)))
    has_factors = lambda tree: bool(jax.tree.leaves(named_factors(tree)))
    return optax.chain(if_nodes(frozen, has_factors), rest)


def _factors(tree: PyTree) -> PyTree:
    """The mask of factors, of nodes and of pools."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    keep = lambda x: not is_masked(x)
    return jax.tree.map(keep, named_factors(tree), is_leaf=is_masked)
