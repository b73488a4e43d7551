"""Mixtures of Gaussians of low rank, and the denoiser that belongs to them."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from .._arguments import check_key
from .._sharding import gathered
from ..linalg import cross, nonzero, outer, rounding, times
from ._samples import as_samples, check_whole
from .k_subspaces import k_subspaces


class LowRankMixture(eqx.Module):
    """``x ~ Σ_k π_k N(μ_k, W_k W_kᵀ + s_k² I)``, with thin factors ``W_k (d, r)``.

    Attributes:
        shares: π, ``(K,)``.
        means: μ, ``(K, d)``.
        factors: W, ``(K, d, r)``.
        noise: s, ``(K,)``, standard deviations.
    """

    shares: Float[Array, " k"]
    means: Float[Array, "k d"]
    factors: Float[Array, "k d r"]
    noise: Float[Array, " k"]

    def log_density(
        self, samples: Float[ArrayLike, "n d"], noise: ArrayLike = 0.0
    ) -> Float[Array, " n"]:
        """The log density of samples with noise of a standard deviation added."""
        return logsumexp(self._joint(_matrix(samples), noise)[0], axis=1)

    def responsibilities(
        self, samples: Float[ArrayLike, "n d"], noise: ArrayLike = 0.0
    ) -> Float[Array, "n k"]:
        """The probability of each component, given a noisy sample."""
        return jax.nn.softmax(self._joint(_matrix(samples), noise)[0], axis=1)

    def predict(self, samples: Float[ArrayLike, "n d"]) -> Int[Array, " n"]:
        """The most probable component of each sample."""
        return jnp.argmax(self.responsibilities(samples), axis=1)

    def denoise(
        self, samples: Float[ArrayLike, "n d"], noise: ArrayLike
    ) -> Float[Array, "n d"]:
        """The posterior mean ``E[x | x + σ ε = y]``: weighted, shrunk projections.

        ``Σ_k p_k(y) (μ_k + C_k (C_k + σ² I)⁻¹ (y − μ_k))`` with the covariances
        ``C_k = W_k W_kᵀ + s_k² I``. It is ``y + σ² ∇ log p_σ(y)``, what the network of a
        diffusion model learns.

        Args:
            samples: y, ``(n, d)``.
            noise: σ, positive; may be a tracer.
        """
        y = _matrix(samples)
        joint, solved = self._joint(y, noise)
        weights = jax.nn.softmax(joint, axis=1)
        # C (C + σ²)⁻¹ = I − σ² (C + σ²)⁻¹
        score = jnp.sum(weights.T[:, :, None] * solved, axis=0)
        return y - jnp.asarray(noise, y.dtype) ** 2 * score

    def _joint(self, x: Array, noise: ArrayLike) -> tuple[Array, Array]:
        """``log π_k N(x)``, ``(n, k)``, and ``(C_k + σ² I)⁻¹ (x − μ_k)``, ``(k, n, d)``."""
        variance = self.noise**2 + jnp.asarray(noise, x.dtype) ** 2

        def of_one(mean, factor, v):
            rest = x - mean[None, :]
            root = jnp.sqrt(v)
            inverse, logdet = _woodbury(factor / root)
            inner = times(times(rest, factor / root), inverse)
            solved = (rest - outer(inner, factor / root)) / v
            log = jnp.sum(rest * solved, axis=1) + logdet
            return log + x.shape[1] * jnp.log(2 * jnp.pi * v), solved

        logs, solved = jax.vmap(of_one)(self.means, self.factors, variance)
        return jnp.log(self.shares)[None, :] - logs.T / 2, solved


class MixtureFit(eqx.Module):
    """What :func:`fit_low_rank_mixture` returns.

    Attributes:
        mixture: the :class:`LowRankMixture`.
        labels: ``(n,)``, the most probable component of each sample.
        log_density: the mean over the samples.
        history: ``(max_steps,)``, that at the start of each step; the last ones repeat.
        converged: whether a step raised it by less than ``tol`` a number.
        steps: the steps taken.
    """

    mixture: LowRankMixture
    labels: Int[Array, " n"]
    log_density: Float[Array, ""]
    history: Float[Array, " s"]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]


class _Carry(NamedTuple):
    mixture: LowRankMixture
    value: Array
    gain: Array
    steps: Array
    history: Array


def fit_low_rank_mixture(
    samples: Float[ArrayLike, "n d"],
    n_components: int,
    rank: int,
    *,
    restarts: int = 16,
    tol: ArrayLike = 1e-6,
    max_steps: int = 500,
    key: PRNGKeyArray,
) -> MixtureFit:
    """A mixture of Gaussians of low rank, by expectation and maximization.

    Mixtures of probabilistic principal component analyzers. With the responsibilities
    ``p_ik``, means ``μ_k = Σ_i p_ik x_i / m_k`` and scatters ``S_k`` about them::

        M = W ᵀW + s² I,    V = S W,    W ← V (s² I + M⁻¹ Wᵀ V)⁻¹,
        s² ← tr(S − V M⁻¹ Wᵀ_new) / d

    No scatter is formed: a step is a few products of the samples with ``(d, r)`` factors.
    The log density never falls. The start is the best of affine :func:`k_subspaces`.

    Args:
        samples: ``(n, d)``, one in a row.
        n_components: K.
        rank: r of each covariance, from 1 to d − 1.
        restarts: of the start.
        tol: the gain of the log density a number of a sample at which to stop.
        max_steps: at most as many steps.
        key: for the start.

    Returns:
        A :class:`MixtureFit`, in float32 or wider. No ``s_k`` falls below the rounding of
        the samples, so that samples without noise have a finite density.

    Raises:
        ValueError: for samples that are no matrix, or numbers that are out of range.
        TypeError: for complex samples, or a key that is none.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> keys = jax.random.split(jax.random.key(0))
        >>> lines = jnp.array([[3.0, 0.0, 0.0], [0.0, 3.0, 3.0]])
        >>> x = jax.random.normal(keys[0], (100, 1)) * jnp.repeat(lines, 50, axis=0)
        >>> x = x + 0.1 * jax.random.normal(keys[1], x.shape)
        >>> fit = lrjax.clustering.fit_low_rank_mixture(x, 2, 1, key=jax.random.key(1))
        >>> print(fit.mixture.noise.round(1), fit.converged)
        [0.1 0.1] True
        >>> fit.mixture.denoise(x, 0.5).shape
        (100, 3)

    Reference:
        M. E. Tipping, C. M. Bishop, "Mixtures of probabilistic principal component
        analyzers" (1999), Neural Computation; of the denoiser: P. Wang, H. Zhang, Z.
        Zhang, S. Chen, Y. Ma, Q. Qu, "Diffusion models learn low-dimensional
        distributions via subspace clustering" (2024), arXiv 2409.02426. Special case: one
        component is probabilistic principal component analysis, whose closed form is an
        eigendecomposition.
    """
    name = "fit_low_rank_mixture"
    check_key(name, key)
    x = gathered(lax.stop_gradient(as_samples(name, samples)))
    n, d = x.shape
    check_whole(name, "rank", rank, min(n, d) - 1)
    check_whole(name, "max_steps", max_steps)
    middle = jnp.mean(x, axis=0)
    size = nonzero(jnp.max(jnp.abs(x - middle[None, :])))
    x = (x - middle[None, :]) / size
    start = k_subspaces(x, n_components, rank, affine=True, restarts=restarts, key=key)
    smallest = rounding(x.dtype, d) * jnp.sqrt(nonzero(jnp.mean(x**2)))
    mixture = _from_subspaces(x, start.labels, start.bases, start.means, smallest)

    least = jnp.asarray(tol, x.dtype) * d
    end = _climb(x, mixture, smallest, least, max_steps=max_steps)
    found, shift = end.mixture, d * jnp.log(size)
    found = LowRankMixture(
        found.shares,
        found.means * size + middle[None, :],
        found.factors * size,
        found.noise * size,
    )
    logs = end.mixture._joint(x, 0.0)[0]
    return MixtureFit(
        found,
        jnp.argmax(logs, axis=1),
        jnp.mean(logsumexp(logs, axis=1)) - shift,
        end.history - shift,
        end.gain <= least,
        end.steps,
    )


# Compiled once for samples of one shape: fits are also called outside of jit.
@functools.partial(jax.jit, static_argnames="max_steps")
def _climb(
    x: Array, mixture: LowRankMixture, smallest: Array, least: Array, *, max_steps: int
) -> _Carry:
    """Expectation and maximization until a step gains no more than the least."""

    def step(carry: _Carry) -> _Carry:
        logs = carry.mixture._joint(x, 0.0)[0]
        value = jnp.mean(logsumexp(logs, axis=1))
        new = _maximized(x, jax.nn.softmax(logs, axis=1), carry.mixture, smallest)
        history = jnp.where(jnp.arange(max_steps) >= carry.steps, value, carry.history)
        return _Carry(new, value, value - carry.value, carry.steps + 1, history)

    infinite = jnp.asarray(jnp.inf, x.dtype)
    first = _Carry(
        mixture,
        -infinite,
        infinite,
        jnp.zeros((), jnp.int32),
        jnp.zeros(max_steps, x.dtype),
    )
    return lax.while_loop(lambda c: (c.gain > least) & (c.steps < max_steps), step, first)


def _from_subspaces(
    x: Array, labels: Array, bases: Array, means: Array, smallest: Array
) -> LowRankMixture:
    k, d, rank = bases.shape
    member = (labels[:, None] == jnp.arange(k)[None, :]).astype(x.dtype)
    counts = jnp.sum(member, axis=0)

    def of_one(weights, count, basis, mean):
        rest = weights[:, None] * (x - mean[None, :])
        along = times(rest, basis)
        variances = jnp.sum(along**2, axis=0) / nonzero(count)
        beyond = (jnp.sum(rest**2) - jnp.sum(along**2)) / nonzero(count) / (d - rank)
        spread = jnp.sqrt(jnp.maximum(variances, smallest**2))
        return basis * spread[None, :], jnp.sqrt(jnp.maximum(beyond, smallest**2))

    factors, noise = jax.vmap(of_one)(member.T, counts, bases, means)
    # An empty component may still win samples.
    shares = jnp.maximum(counts, 1)
    return LowRankMixture(shares / jnp.sum(shares), means, factors, noise)


def _maximized(x: Array, weights: Array, old: LowRankMixture, smallest: Array):
    n, d = x.shape
    counts = jnp.sum(weights, axis=0)

    def of_one(p, count, mean, factor, noise):
        there = count > 1e-3  # of a sample; what has lost all of them stays
        mass = jnp.where(there, count, 1)
        new_mean = jnp.sum(p[:, None] * x, axis=0) / mass
        rest = x - new_mean[None, :]
        v = noise**2
        scattered = cross(p[:, None] * rest, times(rest, factor)) / mass
        root = factor / noise
        inverse, _ = _woodbury(root)  # v M⁻¹
        inner = times(inverse, cross(factor, scattered)) / v
        identity = jnp.eye(inner.shape[0], dtype=x.dtype)
        new = jnp.linalg.solve(v * identity + inner.T, scattered.T).T
        trace = jnp.sum(p[:, None] * rest**2) / mass
        left = trace - jnp.sum(times(scattered, inverse) * new) / v
        new_noise = jnp.sqrt(jnp.maximum(left / d, smallest**2))
        pick = lambda a, b: jnp.where(there, a, b)
        return pick(new_mean, mean), pick(new, factor), pick(new_noise, noise)

    means, factors, noise = jax.vmap(of_one)(
        weights.T, counts, old.means, old.factors, old.noise
    )
    return LowRankMixture(counts / n, means, factors, noise)


def _woodbury(root: Array) -> tuple[Array, Array]:
    """``(I + RᵀR)⁻¹`` and ``log det(I + R Rᵀ)``."""
    matrix = jnp.eye(root.shape[1], dtype=root.dtype) + cross(root, root)
    return jnp.linalg.inv(matrix), jnp.linalg.slogdet(matrix)[1]


def _matrix(samples: ArrayLike) -> Array:
    return as_samples("a mixture", samples, 1)
