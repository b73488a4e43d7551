import dataclasses
from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float

from ..._matrices import Rank, Side
from ...linalg import eigh, orthonormalize, outer, svd, times, truncated_svd
from .basis import MatrixBasis, RefreshContext


class SVD(MatrixBasis):
    """The leading left singular vectors of the gradient, by a full SVD.

    ``a = U S Vᵀ``, ``P = U[:, :r]``. Exact and slow: tens of times the cost of the rest
    of a step. :class:`Power` finds nearly the same subspace for the price of a matmul.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), lrjax.subspaces.SVD(4))

    Reference:
        J. Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank
        projection" (2024), arXiv 2403.03507.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    side: Side = "short"

    def refresh(self, state: Any, a: Array, context: RefreshContext) -> Array:
        """The singular vectors of ``a``."""
        del state
        return left_singular_vectors(a)[0][..., : context.rank]


def left_singular_vectors(a: Float[Array, "*b p q"]) -> tuple[Array, Array]:
    """The left singular vectors and the singular values, in falling order."""
    u, s, _ = svd(lax.stop_gradient(a))
    return u, s


class SampledSVD(MatrixBasis):
    """Singular vectors drawn without replacement, with weights ``σ_i``.

    Successive dominant subspaces of a training run overlap almost fully; sampling lets
    the others take their turn. Drawn by the Gumbel-top-k trick, kept in falling order
    of the singular values.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.SampledSVD(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        H. Zhang et al., "Breaking the frozen subspace: importance sampling for low-rank
        optimization" (2025), arXiv 2502.05790.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    side: Side = "short"

    def refresh(self, state: Any, a: Array, context: RefreshContext) -> Array:
        """A draw of the singular vectors of ``a``."""
        del state
        u, s = left_singular_vectors(a)
        noise = jr.gumbel(context.key, s.shape[-1:], s.dtype)
        noise = noise.reshape((1,) * (s.ndim - 1) + noise.shape)
        scores = jnp.log(jnp.maximum(s, jnp.finfo(s.dtype).tiny)) + noise
        picked = lax.top_k(scores, context.rank)[1]
        return jnp.take_along_axis(u, jnp.sort(picked, axis=-1)[..., None, :], axis=-1)


class GramEigh(MatrixBasis):
    """The leading eigenvectors of ``a aᵀ``: the span of :class:`SVD`, several times faster.

    Singular values below ``sqrt(eps)`` of the largest are lost in rounding, so prefer
    it where the rank stays well inside the numerical rank.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.GramEigh(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    side: Side = "short"

    def refresh(self, state: Any, a: Array, context: RefreshContext) -> Array:
        """The eigenvectors of ``a aᵀ``."""
        del state
        return leading_eigenvectors(outer(a, a), context.rank)


def leading_eigenvectors(g: Float[Array, "*b p p"], rank: int) -> Float[Array, "*b p r"]:
    """The eigenvectors of the largest eigenvalues, in falling order."""
    return eigh(lax.stop_gradient(g))[1][..., ::-1][..., :rank]


class RandomizedSVD(MatrixBasis):
    """The leading left singular vectors, from a Gaussian sketch.

    Args:
        rank: see :class:`Basis`.
        power_iters: subspace iterations of the sketch.
        oversample: extra columns of the sketch.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.RandomizedSVD(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness:
        probabilistic algorithms for constructing approximate matrix decompositions"
        (2011), arXiv 0909.4061; used by D. Su et al., "GaLore 2: large-scale LLM
        pre-training by gradient low-rank projection" (2025), arXiv 2504.20437.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    power_iters: int = 1
    oversample: int = 8
    side: Side = "short"

    def refresh(self, state: Any, a: Array, context: RefreshContext) -> Array:
        """The singular vectors of ``a``, as far as the sketch sees them."""
        del state
        return truncated_svd(
            a,
            context.rank,
            method="randomized",
            key=context.key,
            power_iters=self.power_iters,
            oversample=self.oversample,
            precision=None,
        ).left


class RangeFinder(MatrixBasis):
    """An orthonormal basis of ``a Ω`` with Gaussian ``Ω (q, r)``: one matmul, no memory.

    Args:
        rank: see :class:`Basis`.
        side: see :class:`Basis`.

    Example:
        >>> import lrjax, optax
        >>> basis = lrjax.subspaces.RangeFinder(4)
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), basis)

    Reference:
        N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness:
        probabilistic algorithms for constructing approximate matrix decompositions"
        (2011), arXiv 0909.4061.
    """

    rank: Rank
    _: dataclasses.KW_ONLY
    side: Side = "short"

    def refresh(self, state: Any, a: Array, context: RefreshContext) -> Array:
        """An orthonormal basis of a sketch of ``a``."""
        del state
        sketch = jr.normal(context.key, (a.shape[-1], context.rank), a.dtype)
        sketch = jnp.broadcast_to(sketch, (*a.shape[:-2], *sketch.shape))
        return orthonormalize(times(a, sketch, precision=None))
