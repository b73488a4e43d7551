import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_row_norms
from ._common import DecayMask, finish, on_nodes, whole_nodes


@checks_trees
def allora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    most: ArrayLike = 2.0,
    inner: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """ALLoRA: a learning rate for each row of the factors, larger where the row is small.

    The direction of ``inner``, each row ``x`` of ``B = left`` and of ``A = rightᵀ`` times
    ``1/√(‖x‖ + 1/most²)``, see :func:`lrjax.scale_by_row_norms`: B leaves zero fast, which
    takes the place of dropout and of the scale of the adapter (``alpha = rank``, no
    dropout). For gradient descent, ``inner=optax.identity()``, that scales the gradients,
    as the paper does; Adam would divide such a scale out again, so it is put behind
    ``inner``.

    Args:
        learning_rate: a number or a schedule.
        most: the largest factor, at rows that are zero.
        inner: transform of the gradients of the factors, and of all other leaves; Adam by
            default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without a LowRank node it is
        ``inner`` with a learning rate.

    Raises:
        ValueError: for a negative ``most``.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.zeros((3, 1)), jnp.full((2, 1), 3.0))
        >>> grad = lrjax.LowRank(jnp.ones((3, 1)), jnp.zeros((2, 1)))
        >>> tx = lrjax.allora(0.1, inner=optax.identity())
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left.ravel())
        [-0.2 -0.2 -0.2]

    Reference:
        H. Huang, R. Balestriero, "ALLoRA: adaptive learning rate mitigates LoRA fatal
        flaws" (2024), arXiv 2410.09692. Special case: ``most=0`` leaves the factors where
        they are.
    """
    tx = optax.chain(
        whole_nodes(),
        optax.scale_by_adam() if inner is None else inner,
        on_nodes(scale_by_row_norms(most)),
    )
    return finish(tx, learning_rate, weight_decay, mask)
