import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike

from .._arguments import checks_trees
from .._matrices import DefaultRule, Where, is_hidden_matrix
from ..linalg import energy_mask, map_singular_values
from ..transforms import add_nuclear_norm, every, on_matrices


@checks_trees
def trp(
    learning_rate: optax.ScalarOrSchedule,
    *,
    energy: ArrayLike = 0.9,
    period: int | Array = 20,
    nuclear_weight: ArrayLike = 3e-4,
    inner: optax.GradientTransformation | None = None,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TRP: dense weights that are projected to low rank every so often.

    After each ``period``-th step a matrix keeps the fewest leading singular values that
    hold the share ``energy`` of ``Σσ²``; in between it moves freely. The gradient of that
    step has ``nuclear_weight · U_k V_kᵀ`` of these k singular values added, a subgradient
    of the nuclear norm. The momentum is not projected.

    Departure from the published code: it projects before the step, and so takes the
    singular vectors of the projected weights, which are the same ones.

    Args:
        learning_rate: a number or a schedule.
        energy: the share that is kept, in (0, 1].
        period: of the projection; may be traced.
        nuclear_weight: of the subgradient.
        inner: transform of the gradients; momentum 0.9 by default.
        where: which leaves, and which axes are rows; see
            :func:`lrjax.transforms.on_matrices`. The others are trained as they are.

    Returns:
        An optax optimizer; ``update`` needs ``params``.

    Raises:
        ValueError: as :func:`lrjax.every`, :func:`lrjax.add_nuclear_norm`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 0.1]))
        >>> loss = lambda w: jnp.sum((w - target) ** 2)
        >>> tx = lrjax.trp(0.02, period=5, where=lambda path, shape: True)
        >>> step = jax.jit(lambda w, s: tx.update(jax.grad(loss)(w), s, w))
        >>> w = jnp.eye(3)
        >>> state = tx.init(w)
        >>> for _ in range(60):
        ...     updates, state = step(w, state)
        ...     w = optax.apply_updates(w, updates)
        >>> print(lrjax.metrics.numerical_rank(w))
        2

    Reference:
        Y. Xu et al., "TRP: trained rank pruning for efficient deep neural networks"
        (2020), arXiv 2004.14566.
    """
    rule = DefaultRule(is_hidden_matrix) if where is None else where
    kept = lambda values: jnp.where(energy_mask(values, energy), values, 0)
    penalty = add_nuclear_norm(nuclear_weight, where=rule, energy=energy)
    return optax.chain(
        every(period, penalty),
        optax.trace(0.9) if inner is None else inner,
        optax.scale_by_learning_rate(learning_rate),
        every(period, on_matrices(lambda w: map_singular_values(kept, w), where)),
    )
