from typing import Any

import jax
import optax
from jaxtyping import ArrayLike

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, like, map_nodes, sides
from ....lowrank import LowRank, project_to_tangent
from ..._checks import check_non_negative
from ._precondition import precondition


@checks_trees
def scale_by_tangent(
    damping: ArrayLike = 0.0, *, relative: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Move the product of two factors along the projected full gradient.

    For a node ``X = left @ right.T`` with gradients ``G_l = G right`` and ``G_r = Gᵀ
    left`` of the full gradient G, which is never formed::

        P_l = (I − ½ Π_l) G_l (rightᵀright)⁻¹        P_r = (I − ½ Π_r) G_r (leftᵀleft)⁻¹

    where ``Π_l = left (leftᵀleft)⁻¹ leftᵀ``. To first order the product then moves by
    ``Π_l G + G Π_r − Π_l G Π_r``, the projection of G onto the tangent space of the
    matrices of this rank: the direction closest to full fine-tuning that the factors
    allow. :func:`scale_by_gram` counts the part in both spaces twice. Of the many
    pairs of factors with this product the one taken here treats both sides alike and
    does not depend on how X is split. No state, ``O((m + n) r²)``. Leaves that are no
    LowRank nodes pass unchanged. With the scale s of a LoRA pair multiply by ``1/s²``.

    Of a pair with a frozen right factor the tangent space is ``{P rightᵀ}``, and
    ``P_l = G_l (rightᵀright)⁻¹``.

    Args:
        damping: added to the Gram matrices as in :func:`scale_by_gram`.
        relative: if True, ``damping`` multiplies their mean diagonal; if False it is
            absolute.

    Returns:
        A stateless optax transform; ``update`` needs ``params``, and ``frozen``
        where a factor is frozen.

    Raises:
        ValueError: at construction, for negative damping; in ``init``, if the tree holds
            no LowRank node; in ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0]]))
        >>> grad = lrjax.LowRank(jnp.array([[4.0], [8.0]]), jnp.array([[50.0]]))
        >>> tx = lrjax.scale_by_tangent()
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left.ravel().round(4), step.right.round(4))
        [0.34 1.12] [[1.]]

    Reference:
        B. Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013),
        arXiv 1209.3834; for LoRA, with another split of the same step: Z. Wang et al.,
        "LoRA-Pro: are low-rank adapters properly optimized?" (2024), arXiv 2407.18242.
    """
    check_non_negative("scale_by_tangent", "damping", damping)

    def init(params):
        check_has_nodes("scale_by_tangent", params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, frozen: Any = None, **extra):
        del extra
        check_params("scale_by_tangent", params)

        def project(g: LowRank, x: LowRank) -> LowRank:
            if len(sides(g, x)) == 1:
                step = precondition(g, x, damping, relative)
                return like(g, *jax.tree.leaves(step))
            step = project_to_tangent(x, g, damping, relative=relative)
            return like(g, step.left, step.right)

        return map_nodes(project, updates, params, frozen=frozen), state

    return optax.GradientTransformationExtraArgs(init, update)
