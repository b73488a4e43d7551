from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int

from ..._sharding import gathered
from ...linalg import orthonormalize
from ..view import Rank, Side
from .basis import Basis, Dense, Rows


def gaussian(rank: Rank, *, side: Side = "short") -> Basis:
    """Independent ``N(0, 1/r)`` entries, drawn again from the key at every use.

    Nothing but the step of the last refresh is stored. ``E[P Pᵀ] = I``, yet ``P`` is not
    orthonormal: ``P Pᵀ`` is no projector and inflates norms by ``p/r``, so residuals and
    error feedback refuse it.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.gaussian(4), lift=sub.apollo()
        ... )

    Reference:
        Y. Hao, Y. Cao, L. Mou, "Flora" (2024), arXiv 2402.03293.
    """

    def init(shape, rank, dtype, key):
        del rank, dtype, key
        return jnp.zeros(shape[:-2], jnp.int32)

    def refresh(epoch, a, to):
        del a
        return jnp.broadcast_to(to.count, epoch.shape)

    def frame(epoch, key, size, rank):
        shape = (size, rank)
        draw = lambda e: jr.normal(jr.fold_in(key, e), shape, jnp.float32) / rank**0.5
        for _ in range(epoch.ndim):
            draw = jax.vmap(draw)
        return Dense(draw(epoch))

    return Basis(rank, side, refresh, init, frame, orthonormal=False)


def random_orthonormal(rank: Rank, *, side: Side = "short") -> Basis:
    """A uniformly random subspace: orthonormal columns independent of the gradient.

    Unlike the dominant subspace it cannot be captured by gradient noise, so a method
    that stalls on noisy gradients with :func:`svd` converges with it.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.random_orthonormal(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        Y. He, P. Li, Y. Hu, C. Chen, K. Yuan, "Subspace optimization for large language
        models with convergence guarantees" (2024), arXiv 2410.11289.
    """

    def refresh(state, a, to):
        columns = orthonormalize(jr.normal(to.key, (a.shape[-2], to.rank), a.dtype))
        return jnp.broadcast_to(columns, state.shape)

    return Basis(rank, side, refresh)


class SampledRows(NamedTuple):
    """The state of :func:`rows` when it samples: which rows, and their scales."""

    index: Int[Array, "*b r"]
    scale: Float[Array, "*b r"]


def rows(
    rank: Rank,
    *,
    choice: Literal["topk", "sampled", "uniform"] = "topk",
    side: Side = "short",
) -> Basis:
    """A selection of rows of the gradient: the state is ``r`` indices.

    ``"topk"``: the rows of largest norm. ``"uniform"``: any rows, without replacement.
    ``"sampled"``: drawn with replacement with probability ``q_j ∝ ‖a_j‖²`` and scaled by
    ``1/√(r q_j)``, so that ``E[P Pᵀ] = I``; this one is not orthonormal. On Explicit
    meshes the projected axis must not be sharded: there is no rule for picking from it.

    Args:
        rank: see :class:`Basis`.
        choice: how rows are chosen.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Raises:
        ValueError: for an unknown choice.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.rows(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        A. Muhamed, O. Li, D. Woodruff, M. Diab, V. Smith, "Grass" (2024), arXiv
        2406.17660.
    """
    if choice not in ("topk", "sampled", "uniform"):
        raise ValueError(
            f"rows takes choice 'topk', 'sampled' or 'uniform', got {choice!r}."
        )
    sampled = choice == "sampled"

    def init(shape, rank, dtype, key):
        del key
        index = jnp.broadcast_to(jnp.arange(rank, dtype=jnp.int32), (*shape[:-2], rank))
        return SampledRows(index, jnp.ones(index.shape, dtype)) if sampled else index

    def refresh(state, a, to):
        del state
        energy = jnp.sum(a**2, axis=-1)
        if choice == "topk":
            return lax.top_k(energy, to.rank)[1]
        if choice == "uniform":
            scores = jr.uniform(to.key, energy.shape[-1:])
            return jnp.broadcast_to(
                lax.top_k(scores, to.rank)[1], (*energy.shape[:-1], to.rank)
            )
        return _sample_rows(energy, to.key, to.rank)

    def frame(state, key, size, rank):
        del key, rank
        return Rows(state.index, size, state.scale) if sampled else Rows(state, size)

    return Basis(rank, side, refresh, init, frame, orthonormal=not sampled)


def _sample_rows(energy: Array, key: Any, rank: int) -> SampledRows:
    total = jnp.sum(energy, axis=-1, keepdims=True)
    probability = energy / jnp.where(total > 0, total, 1)
    # Inverting the distribution function with one set of uniforms for all members.
    cumulative = jnp.cumsum(probability, axis=-1)
    draws = jr.uniform(key, (rank,)) * (1 - jnp.finfo(energy.dtype).eps)
    draws = draws.reshape((1,) * (energy.ndim - 1) + (rank, 1)).astype(energy.dtype)
    scaled = draws * cumulative[..., None, -1:]
    index = jnp.sum(cumulative[..., None, :] <= scaled, axis=-1)
    index = jnp.minimum(index, energy.shape[-1] - 1).astype(jnp.int32)
    chosen = jnp.take_along_axis(probability, index, axis=-1)
    return SampledRows(index, 1 / jnp.sqrt(rank * jnp.where(chosen > 0, chosen, 1)))


def sampled_svd(rank: Rank, *, side: Side = "short") -> Basis:
    """Singular vectors drawn without replacement, with weights ``σ_i``.

    Successive dominant subspaces of a training run overlap almost fully; sampling lets
    the others take their turn. Drawn by the Gumbel-top-k trick, kept in falling order
    of the singular values.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Returns:
        The basis rule.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.sampled_svd(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        H. Zhang et al., "Breaking the frozen subspace: importance sampling for low-rank
        optimization" (2025), arXiv 2502.05790.
    """

    def refresh(state, a, to):
        del state
        u, s, _ = jnp.linalg.svd(gathered(lax.stop_gradient(a)), full_matrices=False)
        noise = jr.gumbel(to.key, s.shape[-1:], s.dtype)
        noise = noise.reshape((1,) * (s.ndim - 1) + noise.shape)
        tiny = jnp.finfo(s.dtype).tiny
        picked = lax.top_k(jnp.log(jnp.maximum(s, tiny)) + noise, to.rank)[1]
        return jnp.take_along_axis(u, jnp.sort(picked, axis=-1)[..., None, :], axis=-1)

    return Basis(rank, side, refresh)
