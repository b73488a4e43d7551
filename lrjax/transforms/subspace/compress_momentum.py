from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from ..._sharding import einsum
from ...linalg import orthonormalize
from ...linalg.gram import working_dtype
from ...subspaces.carry import register_roles
from ...subspaces.view import Rank, is_hidden_matrix
from ._leaves import Where, choose


class CompressMomentumState(NamedTuple):
    """The state of :func:`compress_momentum`.

    Attributes:
        buffer: momentum, or error, in the shape of the parameters.
        right: the warm right factor ``Q (*b, n, r)`` of each projected leaf, an empty
            tuple for each other one.
    """

    buffer: PyTree
    right: PyTree


register_roles(CompressMomentumState, first="buffer")


def compress_momentum(
    rank: Rank,
    decay: ArrayLike = 0.95,
    *,
    normalize: Literal["columns", "qr", "none"] = "columns",
    reduce: Callable[[Array], Array] = lambda x: x,
    method: Literal["cholesky", "qr"] = "cholesky",
    where: Where = is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformation:
    """Replace each matrix by a rank-``r`` step of its momentum; what is left is kept.

    With the momentum ``M (m, n)`` and a warm ``Q (n, r)``, one power step::

        M ← M + G
        P = orth(M Q)          R = Mᵀ P
        U = P Q̂ᵀ              Q̂ = R / ‖R_j‖   or   orth(R)   or   R
        M ← M − (1 − μ) P Rᵀ   Q ← Q̂

    ``"columns"`` is Dion, ``"qr"`` its variant with an orthonormal ``Q̂``, so that ``U``
    has singular values one. ``"none"`` with ``decay=0`` is PowerSGD: ``U = P Rᵀ``, the
    best correction in the span, and ``M`` the error, so that the gradients and the
    updates add up to the same, but for ``M``. Within ``shard_map``, ``reduce`` averages
    the two thin products over the devices, ``(m + n) r`` numbers instead of ``m n``; each
    device keeps its own ``M``. At full rank ``M ← μ (M + G)``.

    Args:
        rank: an int, a fraction of ``min(m, n)`` or a callable of ``(path, (m, n))``.
        decay: ``μ``.
        normalize: what ``Q̂`` is.
        reduce: for example ``lambda x: jax.lax.pmean(x, "data")``.
        method: how ``P`` is orthonormalized; see :func:`lrjax.linalg.orthonormalize`.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves to compress; other axes are a batch. The leaves that are not chosen
            are averaged by ``reduce`` and otherwise left alone.
        key: of the first ``Q``; ``jax.random.key(0)`` by default.

    Returns:
        The transform. A zero or non-finite momentum gives a zero update and keeps ``Q``.

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
        K. Ahn, B. Xu, N. Abreu, J. Langford, "Dion" (2025), arXiv 2504.05295; T. Vogels,
        S. P. Karimireddy, M. Jaggi, "PowerSGD" (2019), arXiv 1905.13727.
    """
    if normalize not in ("columns", "qr", "none"):
        raise ValueError(f"normalize must be 'columns', 'qr' or 'none', got {normalize!r}.")
    settings = (decay, normalize, reduce, method)

    def init(params):
        chosen, leaves, treedef = choose("compress_momentum", params, where)
        buffers, rights = [], []
        base = jr.key(0) if key is None else key
        for leaf, x in zip(chosen, leaves, strict=True):
            if leaf is None:
                buffers.append(())
                rights.append(())
                continue
            size = (leaf.sides[1], leaf.rank(rank))
            dtype = working_dtype(x.dtype)
            q = jr.normal(jr.fold_in(base, leaf.index), size, dtype)
            buffers.append(jnp.zeros_like(x, dtype))
            rights.append(jnp.broadcast_to(q, (*leaf.batch, *size)))
        return CompressMomentumState(treedef.unflatten(buffers), treedef.unflatten(rights))

    def update(updates, state, params=None):
        del params
        chosen, leaves, treedef = choose("compress_momentum", updates, where)
        buffers = treedef.flatten_up_to(state.buffer)
        rights = treedef.flatten_up_to(state.right)
        out = []
        for i, (leaf, g) in enumerate(zip(chosen, leaves, strict=True)):
            if leaf is None:
                out.append(reduce(g))
                continue
            momentum = leaf.view(buffers[i])
            u, momentum, rights[i] = _compress(leaf.view(g), momentum, rights[i], *settings)
            buffers[i] = leaf.restore(momentum)
            out.append(leaf.restore(u).astype(g.dtype))
        new = CompressMomentumState(treedef.unflatten(buffers), treedef.unflatten(rights))
        return treedef.unflatten(out), new

    return optax.GradientTransformation(init, update)


def _compress(
    g: Array, buffer: Array, q: Array, decay, normalize, reduce, method
) -> tuple[Any, ...]:
    momentum = buffer + g.astype(buffer.dtype)
    image = reduce(einsum("...mn,...nr->...mr", momentum, q))
    p = orthonormalize(image, method=method)
    right = reduce(einsum("...mn,...mr->...nr", momentum, p))
    sizes = jnp.sum(right**2, axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(sizes) & (sizes > 0)
    new_q = _normalize(right, normalize)
    update = einsum("...mr,...nr->...mn", p, new_q)
    captured = einsum("...mr,...nr->...mn", p, right)
    left_over = momentum - (1 - decay) * captured
    if normalize == "none":
        # A warm start needs the directions of Q alone: unit columns cannot overflow.
        new_q = _normalize(right, "columns")
    return (
        jnp.where(usable, update, 0),
        jnp.where(usable, left_over, jnp.where(sizes == 0, momentum, buffer)),
        jnp.where(usable, new_q, q),
    )


def _normalize(right: Array, normalize: str) -> Array:
    if normalize == "columns":
        norms = jnp.sqrt(jnp.sum(right**2, axis=-2, keepdims=True))
        return right / jnp.where(norms > 0, norms, 1)
    return orthonormalize(right) if normalize == "qr" else right


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
