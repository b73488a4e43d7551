"""As many subspaces as are asked for, by assigning and fitting in turn."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from .._arguments import check_key
from .._sharding import gathered
from ..linalg import cross, nonzero, orthonormalize, rounding, times
from ._samples import as_samples, check_whole


POWER_STEPS = 2  # of each basis, between two assignments
SAME = 1e-5  # costs that are closer, as a share of the best, are those of one result


class KSubspaces(eqx.Module):
    """What :func:`k_subspaces` returns.

    Attributes:
        labels: ``(n,)``, the subspace of each sample.
        bases: ``(K, d, r)``, orthonormal columns.
        means: ``(K, d)``, a point of each subspace; zero for linear ones.
        cost: the mean squared distance of samples and subspaces, that of the best restart.
        costs: ``(restarts,)``, those of all.
        agreement: the share of the restarts that ended at the best cost. Where it is one
            over their number, nothing says that a further one would not be better.
        trusted: whether at least two restarts ended at the best cost, and converged.
        converged: whether no sample of the best restart changed its subspace any more.
        steps: those of the best restart.
    """

    labels: Int[Array, " n"]
    bases: Float[Array, "k d r"]
    means: Float[Array, "k d"]
    cost: Float[Array, ""]
    costs: Float[Array, " s"]
    agreement: Float[Array, ""]
    trusted: Bool[Array, ""]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]

    def distances(self, samples: Float[ArrayLike, "n d"]) -> Float[Array, "n k"]:
        """The squared distance of each sample and each subspace."""
        return _distances(
            self.bases, self.means, as_samples("KSubspaces.distances", samples, 1)
        )

    def predict(self, samples: Float[ArrayLike, "n d"]) -> Int[Array, " n"]:
        """The nearest subspace of each sample."""
        return jnp.argmin(self.distances(samples), axis=1)


def k_subspaces(
    samples: Float[ArrayLike, "n d"],
    n_clusters: int,
    dim: int,
    *,
    affine: bool = False,
    restarts: int = 16,
    max_steps: int = 200,
    key: PRNGKeyArray,
) -> KSubspaces:
    """K subspaces of a dimension, by assigning samples and fitting subspaces in turn.

    It lowers the mean of ``min_k ‖(I − U_k U_kᵀ)(x − μ_k)‖²`` over labels, orthonormal
    bases ``U_k (d, r)`` and, with ``affine``, points ``μ_k``, else zero. Each step takes
    every sample to its nearest subspace, and every basis by two power steps,
    ``U ← orth(S_k U)`` with the scatter ``S_k`` of its samples: neither ever raises the
    cost, and the fixed points are those of a principal component analysis of every
    cluster, but no scatter is formed or decomposed. A subspace without samples stays.

    Like k-means it ends where it began to go: starts are drawn as those of k-means++, a
    sample far from the subspaces so far together with its nearest neighbors, and all
    restarts run as one program. ``costs`` and ``agreement`` say how much that mattered.

    Args:
        samples: ``(n, d)``, one in a row.
        n_clusters: K.
        dim: r, that of each subspace, from 1 to d − 1.
        affine: whether subspaces may miss the origin.
        restarts: starts, of which the one of the least cost is returned.
        max_steps: at most as many steps.
        key: for the starts.

    Returns:
        A :class:`KSubspaces`, in float32 or wider.

    Raises:
        ValueError: for samples that are no matrix, or numbers that are out of range.
        TypeError: for complex samples, or a key that is none.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> t = jnp.linspace(1.0, 2.0, 20)
        >>> lines = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
        >>> x = jnp.concatenate([jnp.outer(t, line) for line in lines])
        >>> found = lrjax.clustering.k_subspaces(x, 2, 1, key=jax.random.key(0))
        >>> labels = found.labels
        >>> bool((labels[:20] == labels[0]).all() & (labels[20:] != labels[0]).all())
        True
        >>> print(found.trusted)
        True

    Reference:
        P. S. Bradley, O. L. Mangasarian, "k-plane clustering" (2000), Journal of Global
        Optimization; P. Tseng, "Nearest q-flat to m points" (2000), Journal of
        Optimization Theory and Applications. Special case: for one cluster the subspace
        is that of a principal component analysis.
    """
    name = "k_subspaces"
    check_key(name, key)
    x = gathered(lax.stop_gradient(as_samples(name, samples)))
    n, d = x.shape
    check_whole(name, "n_clusters", n_clusters, n)
    check_whole(name, "dim", dim, min(n, d) - 1)
    check_whole(name, "restarts", restarts)
    check_whole(name, "max_steps", max_steps)
    return _fit(
        x, jr.split(key, restarts), n_clusters, dim, affine=affine, max_steps=max_steps
    )


# Compiled once for samples of one shape: fits are also called outside of jit.
@functools.partial(jax.jit, static_argnames=("n_clusters", "dim", "affine", "max_steps"))
def _fit(
    x: Array, keys: Array, n_clusters: int, dim: int, *, affine: bool, max_steps: int
) -> KSubspaces:
    """The best of a start for each key."""
    n, d = x.shape
    size = nonzero(jnp.max(jnp.abs(x)))
    x = x / size

    def one(key: PRNGKeyArray) -> tuple[Array, ...]:
        bases, means = _start(x, n_clusters, dim, affine, key)

        def step(carry):
            bases, means, labels, _, steps = carry
            new = jnp.argmin(_distances(bases, means, x), axis=1).astype(jnp.int32)
            member = (new[None, :] == jnp.arange(n_clusters)[:, None]).astype(x.dtype)
            bases, means = _fitted(x, member, bases, means, affine)
            return bases, means, new, jnp.any(new != labels), steps + 1

        zero = jnp.zeros((), jnp.int32)
        start = (bases, means, jnp.full(n, -1, jnp.int32), jnp.array(True), zero)
        going = lambda carry: carry[3] & (carry[4] < max_steps)
        bases, means, labels, changed, steps = lax.while_loop(going, step, start)
        # Labels rest before bases do.
        member = (labels[None, :] == jnp.arange(n_clusters)[:, None]).astype(x.dtype)
        polish = lambda _, now: _fitted(x, member, now[0], now[1], affine)
        bases, means = lax.fori_loop(0, 10, polish, (bases, means))
        distances = _distances(bases, means, x)
        labels = jnp.argmin(distances, axis=1).astype(jnp.int32)
        return labels, bases, means, jnp.mean(jnp.min(distances, axis=1)), ~changed, steps

    labels, bases, means, costs, converged, steps = jax.vmap(one)(keys)
    best = jnp.argmin(costs)
    slack = rounding(x.dtype, d) ** 2 * jnp.mean(jnp.sum(x**2, axis=1))
    same = costs <= costs[best] * (1 + SAME) + slack
    agreement = jnp.mean(same.astype(x.dtype))
    return KSubspaces(
        labels[best],
        bases[best],
        means[best] * size,
        costs[best] * size**2,
        costs * size**2,
        agreement,
        converged[best] & (jnp.sum(same) > 1),
        converged[best],
        steps[best],
    )


def _distances(bases: Array, means: Array, x: Array) -> Array:
    """Squared, from what is left of a sample: no difference of large numbers."""

    def of_one(basis: Array, mean: Array) -> Array:
        rest = x - mean[None, :]
        rest = rest - times(times(rest, basis), basis.T)
        return jnp.sum(rest**2, axis=1)

    return jax.vmap(of_one)(bases, means).T


def _fitted(
    x: Array, member: Array, bases: Array, means: Array, affine: bool
) -> tuple[Array, Array]:
    """Two power steps toward the principal subspace of each cluster, and its mean."""

    def of_one(weights: Array, basis: Array, mean: Array) -> tuple[Array, Array]:
        count = jnp.sum(weights)
        if affine:
            middle = jnp.sum(weights[:, None] * x, axis=0) / nonzero(count)
            mean = jnp.where(count > 0, middle, mean)
        rest = weights[:, None] * (x - mean[None, :])
        new = basis
        for _ in range(POWER_STEPS):
            new = orthonormalize(cross(rest, times(rest, new)))
        return jnp.where(count > 0, new, basis), mean

    return jax.vmap(of_one)(member, bases, means)


def _start(
    x: Array, n_clusters: int, dim: int, affine: bool, key: PRNGKeyArray
) -> tuple[Array, Array]:
    """A sample and its nearest neighbors, far from the subspaces before."""
    n, d = x.shape
    count = min(n - 1, dim + 1 if affine else dim)

    def grow(carry, key):
        far, index = carry
        chosen = jr.categorical(key, jnp.log(far))
        sample = x[chosen]
        if affine:
            near = -jnp.sum((x - sample[None, :]) ** 2, axis=1)
        else:
            sizes = nonzero(jnp.sqrt(jnp.sum(x**2, axis=1)))
            near = jnp.abs(times(x, sample[:, None])[:, 0]) / sizes
        others = x[lax.top_k(near, count + 1)[1]]
        mean = jnp.mean(others, axis=0) if affine else jnp.zeros(d, x.dtype)
        rest = (others - mean[None, :]).T
        basis = orthonormalize(rest[:, :dim])
        distance = _distances(basis[None], mean[None], x)[:, 0]
        return (jnp.minimum(far, distance), index + 1), (basis, mean)

    first = (jnp.sum(x**2, axis=1) + jnp.finfo(x.dtype).tiny, 0)
    _, (bases, means) = lax.scan(grow, first, jr.split(key, n_clusters))
    return bases, means
