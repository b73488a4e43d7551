import jax
import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..linalg import polar
from ..lowrank import LowRank
from ..transforms import scale_by_gram
from ._common import by_kind, whole_nodes


@checks_trees
def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.95,
    damping: ArrayLike = 1e-3,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for factor pairs: momentum, whitened by the partner and orthogonalized.

    With the momenta ``M_l (m, r)``, ``M_r (n, r)`` of the gradients of the factors::

        left ← left − ½ η polar(M_l K_r) K_rᵀ       K_r K_rᵀ = (rightᵀright + λI)⁻¹
        right ← right − ½ η polar(M_r K_l) K_lᵀ     K_l K_lᵀ = (leftᵀleft + λI)⁻¹

    Without damping both halves move the product by matrices with singular values ``η/2``,
    so that its step has a spectral norm of at most ``η`` to first order, whatever the
    size of the factors and of the gradient: the learning rate means what it means for
    Muon on the full matrix. The momenta are those of the factors as they come; without
    them (``momentum=0``) the step does not depend on how the product is split. The steps do
    not shrink by themselves: let the learning rate fall to zero.

    Args:
        learning_rate: a number or a schedule.
        momentum: their decay.
        damping: ``λ``, relative to the mean diagonal of the Gram matrix.
        fallback: transform of the leaves that are no LowRank nodes; Adam by default.

    Returns:
        An optax optimizer; ``update`` needs ``params``.

    Raises:
        ValueError: as :func:`lrjax.scale_by_gram`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0]]))
        >>> grad = lrjax.LowRank(jnp.array([[4.0], [8.0]]), jnp.array([[50.0]]))
        >>> tx = lrjax.lora_muon(0.1, damping=0.0)
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(jnp.linalg.norm(step.left @ x.right.T, 2).round(4))
        0.05

    Reference:
        F. L. Cesista, K. Crowson, C. Simal, S. Biderman, "LoRA-Muon: spectral steepest
        descent on the low-rank manifold" (2026), arXiv 2606.12921; K. Jordan et al.,
        "Muon: an optimizer for hidden layers in neural networks" (2024),
        kellerjordan.github.io/posts/muon. Special case: with the identity for ``polar``,
        :func:`lrjax.scaled_gd`.
    """
    direction = optax.chain(
        whole_nodes(),
        optax.trace(momentum),
        scale_by_gram(damping, phi=_half_polar),
    )
    of_others = optax.scale_by_adam() if fallback is None else fallback
    return by_kind(direction, of_others, learning_rate)


def _half_polar(x: LowRank) -> LowRank:
    # By r × r matrices alone, so that tall factors may be sharded.
    return jax.tree.map(lambda factor: 0.5 * polar(factor, method="gram"), x)
