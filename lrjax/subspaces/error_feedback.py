from typing import Any

import equinox as eqx
from jaxtyping import Array, ArrayLike


class ErrorFeedback(eqx.Module):
    """Keep what the subspace cannot hold, and add it to the next gradient.

    ``a = g + e``, ``e ← a − (1−μ) P R + b1/(1−b1) · (P_old m_old − P m)``: the part of
    the gradient outside the subspace, and the part of the momentum that the change of
    basis lost. Costs a buffer of the size of the leaf.

    Args:
        b1: decay of the inner first moment, an average as in Adam; 0 for none.
        momentum: ``μ``, how much of what the subspace holds stays as well: the buffer is
            then a momentum that decays where it is used, and nowhere else.
        dtype: of the buffer; that of the working precision by default.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.Power(4), feedback=sub.ErrorFeedback()
        ... )

    Reference:
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam: adaptive
        optimization from low-dimensional gradient statistics" (2024), arXiv 2410.16103.
    """

    b1: ArrayLike = 0.9
    momentum: ArrayLike = 0.0
    dtype: Any = None

    def used(self, captured: Array) -> Any:
        """What leaves the buffer of a part that the subspace holds."""
        return (1 - self.momentum) * captured

    def momentum_share(self, lost: Array) -> Any:
        """The gradient that would replace a lost part of the momentum."""
        return self.b1 / (1 - self.b1) * lost
