import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from ....linalg import nonzero
from ...protocol import (
    Adapter,
    AdapterKind,
    Around,
    AroundKind,
    Gained,
    GainedInputs,
    trained,
)
from ..factors import LoRA


class Magnitude(Around):
    """Lengths of rows of their own: ``W' = diag(m / ‖V‖_row) V`` around another adapter.

    Attributes:
        magnitude: ``m (*b, out)``, trained.
        inner: the adapter whose weight is V.
        columns: ``(*b, in)``, trained: lengths of columns, which are set after the rows'.
    """

    magnitude: Float[Array, "*b out"]
    inner: Adapter
    columns: Float[Array, "*b in"] | None = None

    def trainable(self):
        """The lengths, and what the other adapter trains."""
        both = lambda adapter: (adapter.magnitude, adapter.columns)
        rows = lambda adapter: adapter.magnitude
        spec = trained(self, rows if self.columns is None else both)
        return eqx.tree_at(lambda a: a.inner, spec, self.inner.trainable())

    def prepare(self, site, pool):
        """The ratios of the lengths, computed once; the norms have no gradient."""
        inner, base = self.inner.prepare(site, pool), site.read()
        norms = lax.stop_gradient(inner.row_norms(base))
        rows = Gained(self.magnitude / nonzero(norms), inner)
        if self.columns is None:
            return rows
        norms = lax.stop_gradient(inner.column_norms(base, rows.gain))
        return GainedInputs(self.columns / nonzero(norms), rows)


class WithMagnitude(AroundKind):
    """Any other kind, with the lengths of the rows of the weight trained beside.

    ``W' = diag(m / n) V`` with V the weight that the other kind gives, ``n = ‖V‖_row`` its
    row lengths, over the inputs, without a gradient, and ``m (out,)`` trained from
    ``‖W‖_row``. Around factors n comes from thin products, once a bind, and V is never
    formed. The bias is not scaled.

    With ``columns`` the lengths of the columns follow: ``W' = H diag(c / ‖H‖_col)`` with
    ``H = diag(m / n) V`` and ``c (in,)`` trained from ``‖W‖_col``.

    Args:
        kind: the other kind.
        columns: whether there are lengths of columns as well.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> edora = lrjax.adapters.WithMagnitude(lrjax.LoRAXS(rank=2))
        >>> adapters = lrjax.adapt(model, edora, key=jax.random.key(1))
        >>> adapters["layers.0"].magnitude.shape
        (16,)

    Reference:
        S.-Y. Liu et al., "DoRA: weight-decomposed low-rank adaptation" (2024),
        arXiv:2402.09353; around LoRA-XS: H. Nasiri, P. Garraghan, "EDoRA: efficient
        weight-decomposed low-rank adaptation via singular value decomposition" (2025),
        arXiv:2501.12067.
    """

    kind: AdapterKind
    columns: bool = eqx.field(static=True)

    def __init__(self, kind: AdapterKind, *, columns: bool = False):
        self.kind, self.columns = kind, columns

    def init(self, site, *, key, pool, data=None):
        """The lengths as they are, around the other kind's adapter."""
        inner = self.kind.init(site, key=key, pool=pool, data=data)
        squares = lax.stop_gradient(site.read()) ** 2
        lengths = lambda axis: jnp.sqrt(jnp.sum(squares, axis=axis))
        columns = lengths(0) if self.columns else None
        return Magnitude(magnitude=lengths(1), inner=inner, columns=columns)


class DoRA(WithMagnitude):
    """Weight-decomposed low-rank adaptation: LoRA for directions, lengths beside.

    ``V = W + s · B A``, ``W' = diag(m / ‖V‖_row) V`` with ``m (out,)`` trained from
    ``‖W‖_row`` and the norm without a gradient.

    Args:
        rank: of the factors.
        alpha: numerator of the scale, ``rank`` by default.
        rank_stabilized: as for :class:`lrjax.LoRA`.
        dropout: as for :class:`lrjax.LoRA`: what DoRA changes, ``(W' − W) x``, sees the
            dropped input.
        dtype: of the factors, by default that of each weight; the lengths are in float32
            or higher.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.DoRA(rank=2), key=jax.random.key(1))
        >>> sum(x.size for x in jax.tree.leaves(lrjax.partition(adapters)[0]))
        177

    Reference:
        S.-Y. Liu et al., "DoRA: weight-decomposed low-rank adaptation" (2024),
        arXiv:2402.09353. With ``m = ‖V‖_row`` it is LoRA.
    """

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        rank_stabilized: bool = False,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        settings = {"rank_stabilized": rank_stabilized, "dropout": dropout, "dtype": dtype}
        super().__init__(LoRA(rank, alpha, **settings))


class BoRA(WithMagnitude):
    """Bi-dimensional weight decomposition: lengths of rows and of columns beside LoRA.

    ``V = W + s · B A``, ``H = diag(m / ‖V‖_row) V``, ``W' = H diag(c / ‖H‖_col)`` with
    ``m (out,)`` and ``c (in,)`` trained from ``‖W‖_row`` and ``‖W‖_col``, and the norms
    without a gradient: ``r (out + in) + out + in`` numbers a matrix. The inputs are scaled
    in place of the columns; for a convolution ``W'`` is formed in every call.

    Args:
        rank: of the factors.
        alpha: numerator of the scale, ``rank`` by default.
        rank_stabilized: as for :class:`lrjax.LoRA`.
        dropout: as for :class:`lrjax.DoRA`.
        dtype: of the factors, by default that of each weight; the lengths are in float32
            or higher.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.Linear(6, 5, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(model, lrjax.adapters.BoRA(2), key=jax.random.key(1))
        >>> sum(x.size for x in jax.tree.leaves(lrjax.partition(adapters)[0]))
        33

    Reference:
        Q. Wang et al., "BoRA: bi-dimensional weight-decomposed low-rank adaptation"
        (2024), arXiv:2412.06441. With ``c = ‖H‖_col`` it is DoRA.
    """

    def __init__(
        self,
        rank: int | np.integer = 8,
        alpha: ArrayLike | None = None,
        *,
        rank_stabilized: bool = False,
        dropout: ArrayLike = 0.0,
        dtype: DTypeLike | None = None,
    ):
        settings = {"rank_stabilized": rank_stabilized, "dropout": dropout, "dtype": dtype}
        super().__init__(LoRA(rank, alpha, **settings), columns=True)
