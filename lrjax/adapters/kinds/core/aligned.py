import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

from ....linalg import truncated_svd
from ....lowrank import LowRank
from ..._settings import check_fits
from .adapter import CoreKind


class LoRASB(CoreKind):
    """LoRA-SB: a trained core between singular vectors of Adam's first step.

    The first step of Adam on the whole weight is ``−η sign(G)``. With
    ``sign(G) ≈ U Σ Vᵀ`` of the given rank, ``W' = W + U R Vᵀ``, where U and V are frozen
    and ``R (r, r)`` is trained from ``−η Σ``: the weight starts *changed*, by the best
    approximation of that step. Data are whole gradients,
    :func:`lrjax.adapters.gradient_statistics` without a rank.

    Args:
        rank: the width of the core.
        learning_rate: ``η``, that of the training to come; 0 starts from the model itself.
        dropout: the probability with which an input is dropped, given a key in ``bind``.
        dtype: of the arrays, by default that of each weight.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1); in :func:`lrjax.adapt`,
            for a rank above the smaller side of a matrix.
        TypeError: in :func:`lrjax.adapt`, for data that are no whole gradient.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.adapters.LoRASB(rank=1, learning_rate=0.5)
        >>> adapters = lrjax.adapt(
        ...     model, kind, data={"": jnp.ones((3, 4))}, key=jax.random.key(1))
        >>> print((lrjax.merge(model, adapters).weight - model.weight).round(4)[0])
        [-0.5 -0.5 -0.5 -0.5]

    Reference:
        K. Ponkshe et al., "Initialization using update approximation is a silver bullet for
        extremely efficient low-rank fine-tuning" (2024), arXiv:2411.19557.
    """

    learning_rate: ArrayLike

    def __init__(
        self,
        rank: int | np.integer = 16,
        *,
        learning_rate: ArrayLike = 1e-4,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        self.settings(rank, None, dropout, dtype)
        self.learning_rate = learning_rate

    @property
    def takes_data(self):
        """Gradients."""
        return True

    def init(self, site, *, key, pool=None, data=None):
        """Singular vectors of the signs, and their singular values as the core."""
        check_fits("LoRASB", self.rank, site)
        if isinstance(data, LowRank) or getattr(data, "shape", None) != site.shape:
            raise TypeError(
                f"LoRASB starts from the signs of the whole gradient {site.shape} of "
                f"{site.path or 'the root'}, as lrjax.adapters.gradient_statistics gives "
                f"it without rank=; data= has {data!r}."
            )
        dtype = self.dtype_of(site)
        u, values, v = truncated_svd(jnp.sign(data), self.rank)
        core = -jnp.asarray(self.learning_rate, dtype) * jnp.diag(values).astype(dtype)
        return self.adapter(LowRank(u.astype(dtype), v.astype(dtype)), core)
