import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_gram, unit_norm
from ._common import Minimum, toward_minimum


@checks_trees
def scaled_subgradient(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    f_min: Minimum = None,
    damping: ArrayLike | optax.Schedule = 0.0,
    relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The scaled subgradient method for losses with a kink, such as the l1 norm.

    The direction is that of :func:`lrjax.scaled_gd`; a constant step cannot converge on a
    kink, so its length is, with ``P`` the direction and ``G`` the subgradient,

    - ``f_min`` given: Polyak's, ``η (value − f_min) / ⟨G, P⟩``;
    - ``f_min="search"``: the same with a level that is searched on the way,
      :func:`lrjax.scale_by_target_level`. Needs to be told nothing, and one to three times
      the steps;
    - else: ``η / sqrt(⟨G, P⟩)``, a step of length ``η`` in the metric of the
      preconditioner, about the Frobenius distance that the matrix moves. Pass a
      geometric schedule such as ``optax.exponential_decay(0.5 * norm, 1, 0.95)``: the
      error then falls by the same factor a step, if that is not too ambitious.

    Args:
        learning_rate: ``η``, a number or a schedule.
        f_min: the smallest value of the loss, or ``"search"``.
        damping: see :func:`lrjax.scale_by_gram`.
        relative: see :func:`lrjax.scale_by_gram`.

    Returns:
        An optax optimizer; with ``f_min`` its update needs ``value`` and ``grad``, and the
        step is one of all leaves. Those that are no LowRank nodes keep their gradient as
        direction.

    Raises:
        ValueError: as :func:`lrjax.scale_by_gram` and :func:`lrjax.scale_by_polyak`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([100.0, 1.0]))
        >>> loss = lambda x: jnp.sum(jnp.abs(x.materialize() - target))
        >>> x = lrjax.LowRank(jnp.eye(2) + 0.1, jnp.eye(2))
        >>> tx = lrjax.scaled_subgradient(f_min=0.0)
        >>> state = tx.init(x)
        >>> for _ in range(100):
        ...     value, grad = jax.value_and_grad(loss)(x)
        ...     updates, state = tx.update(grad, state, x, value=value, grad=grad)
        ...     x = optax.apply_updates(x, updates)
        >>> print(jnp.diag(x.materialize()).round(2))
        [100. 1.]

    Reference:
        T. Tong, C. Ma, Y. Chi, "Low-rank matrix recovery with scaled subgradient methods:
        fast and robust convergence without the condition number" (2021), arXiv
        2010.13364.
    """
    phi = unit_norm if f_min is None else None
    return optax.chain(
        toward_minimum(scale_by_gram(damping, relative=relative, phi=phi), f_min),
        optax.scale_by_learning_rate(learning_rate),
    )
