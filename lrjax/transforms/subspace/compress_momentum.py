from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from ..._sharding import einsum
from ...linalg import orthonormalize
from ...linalg.gram import working_dtype
from ...subspaces.view import MatrixSpec, Rank, is_hidden_matrix, resolve_rank


class CompressMomentumState(NamedTuple):
    """The state of :func:`compress_momentum`.

    Attributes:
        buffer: momentum, or error, in the shape of the parameters.
        right: the warm right factor ``Q (*b, n, r)`` of each projected leaf, an empty
            tuple for each other one.
    """

    buffer: PyTree
    right: PyTree


def compress_momentum(
    rank: Rank,
    decay: ArrayLike = 0.95,
    *,
    normalize: Literal["columns", "qr", "none"] = "columns",
    reduce: Callable[[Array], Array] = lambda x: x,
    method: Literal["cholesky", "qr"] = "cholesky",
    where: Callable[[str, tuple[int, ...]], bool] = is_hidden_matrix,
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
        where: ``(path, shape) -> bool``, the leaves to compress; leading axes are a
            batch. The others are averaged by ``reduce`` and otherwise left alone.
        key: of the first ``Q``; ``jax.random.key(0)`` by default.

    Returns:
        The transform. A zero or non-finite momentum gives a zero update and keeps ``Q``.

    Raises:
        ValueError: for an unknown ``normalize``, or a rank that makes no sense.

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

    def chosen(tree):
        flat, treedef = jtu.tree_flatten_with_path(tree)
        names = [(jtu.keystr(path), x) for path, x in flat]
        flags = [where(name, tuple(jnp.shape(x))) for name, x in names]
        if any(isinstance(flag, MatrixSpec) for flag in flags):
            raise ValueError("compress_momentum takes where= answers True and False alone.")
        return names, flags, treedef

    def init(params):
        names, flags, treedef = chosen(params)
        buffers, rights, drawn = [], [], 0
        base = jr.key(0) if key is None else key
        for (name, x), flag in zip(names, flags, strict=True):
            if not flag:
                buffers.append(())
                rights.append(())
                continue
            # Leaves that are left alone do not count: a mask may hide them or not.
            drawn += 1
            m, n = x.shape[-2:]
            r = resolve_rank(rank, name, m, n)
            dtype = working_dtype(x.dtype)
            q = jr.normal(jr.fold_in(base, drawn), (n, r), dtype)
            buffers.append(jnp.zeros_like(x, dtype))
            rights.append(jnp.broadcast_to(q, (*x.shape[:-2], n, r)))
        return CompressMomentumState(treedef.unflatten(buffers), treedef.unflatten(rights))

    def update(updates, state, params=None):
        del params
        names, flags, treedef = chosen(updates)
        buffers = treedef.flatten_up_to(state.buffer)
        rights = treedef.flatten_up_to(state.right)
        out = []
        for i, ((_, g), flag) in enumerate(zip(names, flags, strict=True)):
            if not flag:
                out.append(reduce(g))
                continue
            u, buffers[i], rights[i] = _compress(g, buffers[i], rights[i], *settings)
            out.append(u.astype(g.dtype))
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
