import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_factors
from ._common import DecayMask, adam, finish, on_nodes, whole_nodes


@checks_trees
def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: ArrayLike = 16.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: Adam with a larger learning rate for the factor that starts at zero.

    With ``U`` the step of Adam, of each factor by itself::

        left ← left − ratio · η (U_l + γ left)        right ← right − η (U_r + γ right)

    A LoRA pair has ``left = B (out, r)`` and ``right = Aᵀ (in, r)``. As the width grows
    both factors learn features only if their rates grow apart; the base rate is then about
    half of that of plain Adam. The ratio is one knob with the scale of the adapter and the
    size of its start: from ``B = 0``, to the rounding of ``eps``, it is Adam with another
    start of A and another scale.

    Args:
        learning_rate: ``η``, a number or a schedule.
        ratio: the rate of ``left`` over that of ``right``.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the root of the second moment; zero is allowed.
        weight_decay: ``γ``, decoupled weight decay at the rate of each factor.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; leaves that are no LowRank nodes take steps of Adam.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.zeros((1, 1)), jnp.ones((1, 1)))
        >>> grad = lrjax.LowRank(jnp.full((1, 1), 3.0), jnp.full((1, 1), 5.0))
        >>> tx = lrjax.lora_plus(0.1, ratio=4.0)
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left.round(4), step.right.round(4))
        [[-0.4]] [[-0.1]]

    Reference:
        S. Hayou, N. Ghosh, B. Yu, "LoRA+: efficient low rank adaptation of large models"
        (2024), arXiv 2402.12354. Special case: with ``ratio=1`` it is Adam.
    """
    return optax.chain(
        whole_nodes(),
        finish(adam(b1, b2, eps), learning_rate, weight_decay, mask),
        on_nodes(scale_factors(left=ratio)),
    )
