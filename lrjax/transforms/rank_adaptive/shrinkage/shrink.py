import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ...._arguments import checks_trees
from ...._matrices import check_real
from ...._tree import check_params
from ....linalg import increment, soft_threshold
from ..._checks import check_non_negative


@checks_trees
def shrink(
    threshold: optax.ScalarOrSchedule, *, twice: bool = False
) -> optax.GradientTransformation:
    """Soft thresholding of what the step arrives at: the proximal map of an L1 norm.

    For the step ``U`` that reaches it and the parameters ``θ``::

        θ ← T(θ + U),  T(x) = sign(x) · max(|x| − threshold, 0)

    so that numbers become exactly zero, and may leave zero again. It stands at the end of
    a chain. For a penalty ``λ ‖θ‖₁`` and steps of length η the threshold is ``η λ``. All
    parameters are shrunk; ``optax.masked`` picks some, the gates of adapters, say.

    Args:
        threshold: in the units of the parameters; a number or a schedule.
        twice: set to zero what is below the threshold after it was shrunk, as well, so
            all below two thresholds: what the code published with SoRA does.

    Returns:
        An optax transform.

    Raises:
        ValueError: for a negative threshold; at ``update``, if no params are given.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = optax.chain(optax.sgd(1.0), lrjax.shrink(0.5))
        >>> w = jnp.array([2.0, 0.25])
        >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
        >>> print(optax.apply_updates(w, updates))
        [1.5 0. ]

    Reference:
        I. Daubechies, M. Defrise, C. De Mol, "An iterative thresholding algorithm for
        linear inverse problems with a sparsity constraint" (2004), arXiv math/0307152;
        for the gates of adapters: N. Ding et al., "Sparse low-rank adaptation of
        pre-trained language models" (2023), arXiv:2311.11696.
    """
    check_non_negative("shrink", "threshold", threshold)

    def init(params):
        check_real("shrink", params)
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        check_params("shrink", params)
        level = threshold(state.count) if callable(threshold) else threshold

        def step(update: Array, x: Array) -> Array:
            goal = (x + update).astype(x.dtype)
            new = soft_threshold(goal, level)
            if twice:
                new = jnp.where(jnp.abs(new) < jnp.asarray(level, x.dtype), 0, new)
            return (new - x).astype(update.dtype)

        state = optax.ScaleByScheduleState(count=increment(state.count))
        return jax.tree.map(step, updates, params), state

    return optax.GradientTransformation(init, update)
