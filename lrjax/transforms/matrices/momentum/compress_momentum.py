from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from ...._arguments import checks_trees
from ...._matrices import Rank, Where, map_init, map_matrices
from ...._moments import register_moments
from ...._sharding import placed_as_state, placed_like
from ....linalg import (
    cross,
    nonzero,
    orthonormalize,
    outer,
    product_rounding,
    products_at,
    times,
    working_dtype,
)


class CompressMomentumState(NamedTuple):
    """The state of :func:`compress_momentum`.

    Attributes:
        buffer: momentum, or error, in the shape of the parameters.
        right: the warm right factor ``Q (*b, n, r)`` of each projected leaf, an empty
            tuple for each other one.
    """

    buffer: PyTree
    right: PyTree


register_moments(CompressMomentumState, first="buffer")


@checks_trees
def compress_momentum(
    rank: Rank,
    momentum: ArrayLike = 0.95,
    *,
    normalize: Literal["columns", "qr", "none"] = "columns",
    reduce: Callable[[Array], Array] | None = None,
    method: Literal["cholesky", "qr"] = "cholesky",
    where: Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformation:
    """Replace each matrix by a rank-``r`` step of its momentum; what is left is kept.

    With the momentum ``M (m, n)`` and a warm ``Q (n, r)``, one power step::

        M ← M + G
        P = orth(M Q)          R = Mᵀ P
        U = P Q̂ᵀ              Q̂ = R / ‖R_j‖   or   orth(R)   or   R
        M ← M − (1 − μ) P Rᵀ   Q ← Q̂

    ``"columns"`` is Dion, ``"qr"`` its variant with an orthonormal ``Q̂``, so that ``U``
    has singular values one. ``"none"`` with ``momentum=0`` is PowerSGD: ``U = P Rᵀ``, the
    best correction in the span, and ``M`` the error, so that the gradients and the
    updates add up to the same, but for ``M``. Within ``shard_map``, ``reduce`` averages
    the two thin products over the devices, ``(m + n) r`` numbers instead of ``m n``; each
    device keeps its own ``M``. At full rank ``M ← μ (M + G)``.

    Args:
        rank: an int, a fraction of ``min(m, n)`` or a callable of ``(path, (m, n))``.
        momentum: ``μ``.
        normalize: what ``Q̂`` is.
        reduce: for example ``lambda x: jax.lax.pmean(x, "data")``; None for one device.
        method: how ``P`` is orthonormalized; see :func:`lrjax.linalg.orthonormalize`.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to compress; other axes are a batch. The leaves that are not chosen
            are averaged by ``reduce`` and otherwise left alone.
        precision: of the products with the momentum, as ``jax.default_matmul_precision``
            takes it; None for the one in force. See :func:`lrjax.project_updates`.
        key: of the first ``Q``; ``jax.random.key(0)`` by default.

    Returns:
        The transform. A zero or non-finite momentum gives a zero update and keeps ``Q``;
        so do the columns that a momentum of lower rank leaves without a direction.

    Raises:
        ValueError: for an unknown ``normalize``; at ``init``, if no leaf is chosen, a
            chosen leaf is no matrix, or the rank makes no sense.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.compress_momentum(2)
        >>> g = {"weight": jnp.eye(8)}
        >>> updates, state = tx.update(g, tx.init(g))
        >>> print(jnp.linalg.matrix_rank(updates["weight"]))
        2

    Reference:
        K. Ahn, B. Xu, N. Abreu, J. Langford, "Dion: distributed orthonormalized updates"
        (2025), arXiv 2504.05295; T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD:
        practical low-rank gradient compression for distributed optimization" (2019),
        arXiv 1905.13727.
    """
    if normalize not in ("columns", "qr", "none"):
        raise ValueError(f"normalize must be 'columns', 'qr' or 'none', got {normalize!r}.")
    reduce = (lambda x: x) if reduce is None else reduce
    settings = (momentum, normalize, reduce, method)

    base = lambda: jr.key(0) if key is None else key

    def init(params):
        def start(leaf, x):
            size = (leaf.sides[1], leaf.rank(rank))
            q = jr.normal(jr.fold_in(base(), leaf.index), size, working_dtype(x.dtype))
            a = leaf.view(jnp.zeros_like(x, q.dtype))
            q = jnp.broadcast_to(q, (*leaf.batch, *size))
            return leaf.restore(a), placed_as_state(q, a)

        return CompressMomentumState(
            *map_init("compress_momentum", where, start, params, 2)
        )

    def update(updates, state, params=None):
        del params

        def one(leaf, g, buffer, right):
            own = leaf.view(g), leaf.matrices(buffer), right
            with products_at(precision, g.dtype):
                u, buffer, right = _compress(*own, *settings)
            return leaf.restore(u, g).astype(g.dtype), leaf.restore(buffer), right

        rest = lambda g, *own: (reduce(g), *own)
        out, *new = map_matrices(
            "compress_momentum", where, one, updates, *state, rest=rest
        )
        return out, CompressMomentumState(*new)

    return optax.GradientTransformation(init, update)


def _compress(
    g: Array, buffer: Array, q: Array, decay, normalize, reduce, method
) -> tuple[Any, ...]:
    momentum = buffer + g.astype(buffer.dtype)
    image = reduce(times(momentum, q, precision=None))
    p = orthonormalize(image, method=method)
    right = reduce(cross(momentum, p, precision=None))
    norms = jnp.sqrt(jnp.sum(right**2, axis=-2, keepdims=True))
    whole = jnp.sqrt(jnp.sum(norms**2, axis=-1, keepdims=True))
    usable = jnp.isfinite(whole) & (whole > 0)
    # A momentum of lower rank leaves rounding in the other columns: no direction at all.
    known = norms > product_rounding(right.dtype, max(momentum.shape[-2:])) * whole
    scaled = _normalize(right, norms, known, normalize)
    update = outer(p, scaled, precision=None)
    captured = outer(p, right, precision=None)
    left_over = momentum - (1 - decay) * captured
    if normalize == "none":
        # A warm start needs the directions of Q alone: unit columns cannot overflow.
        scaled = _normalize(right, norms, known, "columns")
    # A column of Q that found nothing stays where it is, and may find a new direction.
    new_q = jnp.where(known, placed_like(scaled, q), q)
    left_over = placed_like(left_over, buffer)
    return (
        jnp.where(usable, update, 0),
        jnp.where(usable, left_over, jnp.where(whole == 0, momentum, buffer)),
        jnp.where(usable, new_q, q),
    )


def _normalize(right: Array, norms: Array, known: Array, normalize: str) -> Array:
    """``Q̂``, with zeros for the columns that are not known."""
    if normalize == "none":
        return right
    unit = jnp.where(known, right / nonzero(norms), 0)
    if normalize == "columns":
        return unit
    # Unknown columns last: QR makes them anything orthogonal to those before them.
    order = jnp.argsort(~known, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)
    q = orthonormalize(jnp.take_along_axis(unit, order, axis=-1))
    return jnp.where(known, jnp.take_along_axis(q, back, axis=-1), 0)


def data_parallel_specs(state: PyTree, axis_name: str | Sequence[str]) -> PyTree:
    """How ``shard_map`` splits an optimizer state that holds compressed momenta.

    With ``reduce`` set, each device keeps its own momentum, or error, while all else is
    the same on all of them. The global array of a momentum is those of the devices one
    after the other along the first axis.

    Args:
        state: an optimizer state, its shapes (``jax.eval_shape(tx.init, params)``) are
            enough.
        axis_name: the mesh axis, or axes, over which data are split.

    Returns:
        A tree of ``PartitionSpec``, for ``in_specs`` and ``out_specs``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> P = jax.sharding.PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
        >>> tx = lrjax.power_sgd(0.1, rank=2, axis_name="data")
        >>> params = {"weight": jnp.ones((8, 16))}
        >>> specs = lrjax.data_parallel_specs(jax.eval_shape(tx.init, params), "data")
        >>> init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
        >>> @jax.jit
        ... @jax.shard_map(mesh=mesh, in_specs=(P(), specs, P("data")),
        ...                out_specs=(P(), specs))
        ... def step(params, state, batch):
        ...     loss = lambda p: jnp.mean((batch @ p["weight"]) ** 2)
        ...     # Of its own copy: the gradient of a shared one is summed at once.
        ...     own = jax.lax.pcast(params, "data", to="varying")
        ...     updates, state = tx.update(jax.grad(loss)(own), state, params)
        ...     return updates, state
        >>> updates, state = step(params, init(params), jnp.ones((4, 8)))
    """
    is_ours = lambda x: isinstance(x, CompressMomentumState)
    axes = axis_name if isinstance(axis_name, str) else tuple(axis_name)

    def split(part):
        if not is_ours(part):
            return PartitionSpec()
        local = jax.tree.map(lambda _: PartitionSpec(axes), part.buffer)
        return CompressMomentumState(
            local, jax.tree.map(lambda _: PartitionSpec(), part.right)
        )

    return jax.tree.map(split, state, is_leaf=is_ours)
