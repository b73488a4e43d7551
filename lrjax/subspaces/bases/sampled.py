import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._matrices import Rank, Side
from ..._sharding import gathered
from ...linalg import nonzero, orthonormalize
from .basis import Basis, DenseProjector, MatrixBasis, RefreshContext, RowProjector


class Gaussian(Basis):
    """Independent ``N(0, 1/r)`` entries, drawn again from the key at every use.

    Nothing but the step of the last refresh is stored. ``E[P Pᵀ] = I``, yet ``P`` is not
    orthonormal: ``P Pᵀ`` is no projector and inflates norms by ``p/r``, so residuals and
    error feedback refuse it.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.Gaussian(4), lift=sub.ScaledGradient()
        ... )

    Reference:
        Y. Hao, Y. Cao, L. Mou, "Flora: low-rank adapters are secretly gradient
        compressors" (2024), arXiv 2402.03293.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    side: Side = "short"
    orthonormal: ClassVar[bool] = False

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> Int[Array, "*b"]:
        """The number of the step zero."""
        del rank, dtype, key
        return jnp.zeros(shape[:-2], jnp.int32)

    def refresh(
        self, state: Int[Array, "*b"], a: Array, context: RefreshContext
    ) -> Int[Array, "*b"]:
        """The number of the present step."""
        del a
        return jnp.broadcast_to(context.count, state.shape)

    def projector(
        self, state: Array, key: PRNGKeyArray, size: int, rank: int, on_rows: bool
    ) -> DenseProjector:
        """The matrix, drawn from the key and the number of the step."""
        draw = lambda step: (
            jr.normal(jr.fold_in(key, step), (size, rank), jnp.float32) / rank**0.5
        )
        for _ in range(state.ndim):
            draw = jax.vmap(draw)
        return DenseProjector(matrix=draw(state), on_rows=on_rows)


class RandomOrthonormal(MatrixBasis):
    """A uniformly random subspace: orthonormal columns independent of the gradient.

    Unlike the dominant subspace it cannot be captured by gradient noise, so a method
    that stalls on noisy gradients with :class:`SVD` converges with it.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.RandomOrthonormal(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        Y. He, P. Li, Y. Hu, C. Chen, K. Yuan, "Subspace optimization for large language
        models with convergence guarantees" (2024), arXiv 2410.11289.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    side: Side = "short"

    def refresh(self, state: Array, a: Array, context: RefreshContext) -> Array:
        """New columns, the same for every member of a stack."""
        columns = jr.normal(context.key, (a.shape[-2], context.rank), a.dtype)
        return jnp.broadcast_to(orthonormalize(columns), state.shape)


class ScaledRows(NamedTuple):
    """The state of :class:`SelectedRows`: which rows, and the scales of drawn ones."""

    index: Int[Array, "*b r"]
    scale: Float[Array, "*b r"] | None = None


class SelectedRows(Basis):
    """A selection of rows of the gradient: the state is ``r`` indices.

    ``"topk"``: the rows of largest norm, ``"topk_l1"`` by their sums of magnitudes.
    ``"uniform"``: any rows, without replacement.
    ``"sampled"``: drawn with replacement with probability ``q_j ∝ ‖a_j‖²`` and scaled by
    ``1/√(r q_j)``, so that ``E[P Pᵀ] = I``; this one is not orthonormal. On Explicit
    meshes the projected axis must not be sharded: there is no rule for picking from it.

    Args:
        rank: see :class:`Basis`.
        choice: how rows are chosen.
        side: see :class:`Basis`.

    Raises:
        ValueError: for an unknown choice.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.SelectedRows(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        A. Muhamed, O. Li, D. Woodruff, M. Diab, V. Smith, "Grass: compute efficient
        low-memory LLM training with structured sparse gradients" (2024), arXiv
        2406.17660.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    choice: Literal["topk", "topk_l1", "sampled", "uniform"] = "topk"
    side: Side = "short"

    def __check_init__(self):
        if self.choice not in ("topk", "topk_l1", "sampled", "uniform"):
            raise ValueError(
                "SelectedRows takes choice 'topk', 'topk_l1', 'sampled' or 'uniform', got "
                f"{self.choice!r}."
            )

    @property
    def orthonormal(self) -> bool:
        """Unless rows are drawn with replacement."""
        return self.choice != "sampled"

    def init(
        self, shape: tuple[int, ...], rank: int, dtype: Any, key: PRNGKeyArray
    ) -> ScaledRows:
        """The first rows."""
        del key
        index = jnp.broadcast_to(jnp.arange(rank, dtype=jnp.int32), (*shape[:-2], rank))
        ones = jnp.ones(index.shape, dtype) if self.choice == "sampled" else None
        return ScaledRows(index, ones)

    def refresh(self, state: ScaledRows, a: Array, context: RefreshContext) -> ScaledRows:
        """The rows that a gradient chooses."""
        del state
        entries = jnp.abs(a) if self.choice == "topk_l1" else a**2
        energy = gathered(jnp.sum(entries, axis=-1, keepdims=True))[..., 0]
        if self.choice == "sampled":
            return _sample_rows(energy, context.key, context.rank)
        if self.choice == "uniform":
            scores = jr.uniform(context.key, energy.shape[-1:])
            energy = jnp.broadcast_to(scores, energy.shape)
        return ScaledRows(lax.top_k(energy, context.rank)[1])

    def projector(
        self, state: ScaledRows, key: PRNGKeyArray, size: int, rank: int, on_rows: bool
    ) -> RowProjector:
        """The rows, picked from the left or the right."""
        del key, rank
        return RowProjector(
            index=state.index, size=size, scale=state.scale, on_rows=on_rows
        )


def _sample_rows(energy: Array, key: PRNGKeyArray, rank: int) -> ScaledRows:
    total = jnp.sum(energy, axis=-1, keepdims=True)
    probability = energy / nonzero(total)
    # Inverting the distribution function with one set of uniforms for all members.
    cumulative = jnp.cumsum(probability, axis=-1)
    draws = jr.uniform(key, (rank,)) * (1 - jnp.finfo(energy.dtype).eps)
    draws = draws.reshape((1,) * (energy.ndim - 1) + (rank, 1)).astype(energy.dtype)
    scaled = draws * cumulative[..., None, -1:]
    index = jnp.sum(cumulative[..., None, :] <= scaled, axis=-1)
    index = jnp.minimum(index, energy.shape[-1] - 1).astype(jnp.int32)
    chosen = jnp.take_along_axis(probability, index, axis=-1)
    return ScaledRows(index, 1 / jnp.sqrt(rank * nonzero(chosen)))
