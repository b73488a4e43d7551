import optax
from jaxtyping import ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from .._matrices import DefaultRule
from ..transforms import orthogonalize_updates
from ._common import DecayMask, chosen, elsewhere, finish
from ._neurons import matrices_and_factors, outputs_as_rows, outputs_over_inputs


@checks_trees
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices and for the factors of pairs, each in its own layout.

    ``M ← momentum · M + G`` and ``U = √max(1, m/n) · polar(G + momentum · M)`` for a matrix
    of ``m`` outputs and ``n`` inputs. Rows are outputs, as in Equinox, but for leaves
    called ``kernel``, which Flax stores ``(inputs, outputs)``, and for the right factor of
    a :class:`lrjax.LowRank`, which is ``Aᵀ``. So a LoRA pair ``B (m, r)``, ``A (r, n)`` has
    the factors ``√(m/r)`` and 1, and not 1 and ``√(n/r)``. The factors are orthogonalized
    by themselves; :func:`lrjax.lora_muon` does it in the metric of the product. Factors are
    narrow: :func:`lrjax.dion`, which compresses the momentum, comes to this on them.

    Departure from the paper: the polar factor is exact to rounding.

    Args:
        learning_rate: a number or a schedule.
        momentum: its decay.
        nesterov: look ahead by one step; otherwise the polar factor is that of M.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat; by default hidden matrices, and factors of any width.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.orthogonalize_updates`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.zeros((64, 4)), jnp.zeros((32, 4)))
        >>> grad = lrjax.LowRank(jnp.eye(64)[:, :4], jnp.eye(32)[:, :4])
        >>> tx = lrjax.muon(1.0)
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left[0, 0].round(3), step.right[0, 0].round(3))
        -4.0 -1.0

    Reference:
        K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024),
        kellerjordan.github.io/posts/muon. Special case: ``optax.contrib.muon`` with
        dimension numbers that say which axis of each leaf is the output.
    """
    default = DefaultRule(matrices_and_factors)
    where = outputs_as_rows(default if where is None else where)
    tx = optax.chain(
        chosen(optax.trace(momentum, nesterov), where),
        orthogonalize_updates(where=where),
        outputs_over_inputs(where, least=1.0),
        elsewhere(fallback, where),
    )
    return finish(tx, learning_rate, weight_decay, mask)
