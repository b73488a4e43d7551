from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree

from .._arguments import check_key
from .._sites import fold_in_path
from ..linalg import times, truncated_svd, working_dtype
from ..lowrank import LowRank
from .binding import stacked_factors
from .folds.heads import weight_part
from .kinds import Biased, Factors
from .kinds.full import FullCopy
from .protocol import Adapter, Adapters, Pool, is_partial


FLOOR = 1e-6  # beside the singular values, so that those of zero have no noise


class IsotropicPosterior(eqx.Module):
    """A Gaussian around trained adapters: one number says how wide.

    Attributes:
        mean: the adapters, ``left = U diag(d)`` and ``right``, of the same change.
        deviations: ``{path: 1 / (d + 1e-6)}``, of the columns of ``right`` at a scale of 1.
        scale: ``σ``, the deviation of a weight's change along each column of U.
    """

    mean: Adapters
    deviations: dict[str, Float[Array, "*b k"]]
    scale: Float[Array, ""]

    def sample(self, *, key: PRNGKeyArray) -> Adapters:
        """Adapters drawn from it, of the structure of ``mean``.

        Args:
            key: for the noise.
        """
        check_key("sample", key)
        layers = dict(self.mean.layers)
        right_of = lambda own: cast(Factors, weight_part(own)).pair.right
        for path, deviations in self.deviations.items():
            own = layers[path]
            right = right_of(own)
            noise = jr.normal(fold_in_path(key, path), right.shape, right.dtype)
            moved = right + (self.scale * deviations)[..., None, :] * noise
            layers[path] = eqx.tree_at(right_of, own, moved.astype(right.dtype))
        return Adapters(layers, self.mean.pools, self.mean.axes)

    def average(
        self, f: Callable[[Adapters], PyTree], *, key: PRNGKeyArray, samples: int = 10
    ) -> PyTree:
        """``1/S Σ_s f(adapters_s)`` over adapters that are drawn from it.

        Args:
            f: such as the probabilities of a batch: their mean is the prediction.
            key: for the draws.
            samples: S, all at once by ``vmap``.
        """
        check_key("average", key)
        each = jax.vmap(lambda key: f(self.sample(key=key)))(jr.split(key, samples))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), each)


def isotropic_posterior(adapters: Adapters, scale: ArrayLike = 0.0) -> IsotropicPosterior:
    """A posterior of trained adapters without training: noise of one width in the weights.

    With the singular value decomposition ``s B = U diag(d) Vᵀ`` the same change is
    ``B' A'`` with ``B' = U diag(d)`` and ``A' = Vᵀ A``, and

        A'_ij ~ N(A'_ij, (σ / (d_i + 1e-6))²)

    so that the noise of the weight is ``σ U diag(d / (d + 1e-6)) E`` with E standard
    normal: the same in every direction of the span of B, however B and A are cut, and of
    what the scale ``s`` is. :func:`search_scale` finds σ. Copies and biases beside stay
    what they are.

    Args:
        adapters: trained, of kinds whose change is a product of factors; layers may be
            stacked. Of a change of zero there is no noise.
        scale: ``σ``.

    Returns:
        The posterior: a tree of arrays with ``sample`` and ``average``.

    Raises:
        ValueError: by path, for a half of a partition and a change that is no product.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(2, init="small")
        >>> adapters = lrjax.adapt(layer, kind, key=jax.random.key(1))
        >>> posterior = lrjax.adapters.isotropic_posterior(adapters, 0.1)
        >>> same = lrjax.merge(layer, posterior.mean).weight
        >>> bool(jnp.allclose(same, lrjax.merge(layer, adapters).weight))
        True
        >>> predict = lambda own: jax.nn.softmax(lrjax.bind(layer, own)(jnp.ones(4)))
        >>> posterior.average(predict, key=jax.random.key(2)).shape
        (3,)

    Reference:
        H. Shi et al., "Training-free Bayesianization for low-rank adapters of large
        language models" (2024), arXiv:2412.05723. The special case ``σ = 0`` is the
        adapters themselves.
    """
    layers, deviations = {}, {}
    for path, own in adapters.layers.items():
        if is_partial(own):
            raise ValueError(
                f"The adapter at {path!r} is only a part of one: put what lrjax.partition "
                "took apart together again with eqx.combine(params, frozen)."
            )
        inner = weight_part(own)
        if isinstance(inner, FullCopy):
            layers[path] = own
            continue
        pool = adapters.pools.get(own.pool_name() or "")
        new, deviations[path] = _by_singular_vectors(path, inner, pool)
        layers[path] = _around(own, new)
    return IsotropicPosterior(
        Adapters(layers, {}, adapters.axes), deviations, jnp.asarray(scale, float)
    )


class ScaleSearch(NamedTuple):
    """The width that was found, and whether it can be trusted.

    Attributes:
        posterior: with the scale that was found.
        scale: ``σ``; zero if not even the lower end of the bracket holds.
        nll_before: the negative log-likelihood of the adapters themselves.
        nll_least: the least of any scale that was tried, and of none.
        nll_after: that of the mean over the draws, at ``scale``.
        at_lower: whether the lower end raises it too much already: give a lower bracket.
        at_upper: whether the upper end holds: a larger scale may hold as well.
        trusted: neither of these, and ``nll_before`` is finite.
    """

    posterior: IsotropicPosterior
    scale: Float[Array, ""]
    nll_before: Float[Array, ""]
    nll_least: Float[Array, ""]
    nll_after: Float[Array, ""]
    at_lower: Bool[Array, ""]
    at_upper: Bool[Array, ""]
    trusted: Bool[Array, ""]


def search_scale(
    log_likelihoods: Callable[[Adapters], Float[Array, " n"]],
    posterior: IsotropicPosterior,
    *,
    key: PRNGKeyArray,
    tolerance: ArrayLike = 0.003,
    bracket: tuple[ArrayLike, ArrayLike] = (1e-4, 1.0),
    points: int = 13,
    steps: int = 5,
    samples: int = 10,
) -> ScaleSearch:
    """The widest posterior that explains examples as well as any does, nearly.

    The largest σ above the best one of which::

        NLL(σ) ≤ NLL* + tolerance · |NLL*|,   NLL* = min_σ NLL(σ), σ = 0 too,
        NLL(σ) = −1/n Σ_i log 1/S Σ_s p(y_i | adapters_s)

    with the same noise for every σ: first of ``points``, evenly spaced in ``log σ``, then
    by bisection up to the next of them. It is one that was tried, and up to a factor
    ``(high / low)^(1 / ((points − 1) 2^steps))``, 1.02 by default, the largest.

    On examples that the adapters were trained on ``NLL*`` is that of the adapters, and the
    search is its authors'. Where these are fitted perfectly nothing may be lost, and there
    is hardly a posterior. Take examples that were set apart: some width explains them
    better than none, and far beyond it one that explains them as badly as none, which a
    comparison with ``NLL(0)`` would find.

    Args:
        log_likelihoods: ``log p(y_i | adapters)`` of n examples, for adapters of one draw.
        posterior: from :func:`isotropic_posterior`, of any scale.
        key: for the noise.
        tolerance: how much of the negative log-likelihood may be lost.
        bracket: the smallest and the largest scale, positive. The authors' is
            ``(0.001, 0.015)``, for language models.
        points: tried over the bracket, at least two.
        steps: of bisection; all are made, so that it can be jitted.
        samples: S.

    Returns:
        What was found.

    Raises:
        ValueError: for a bracket that is not positive and increasing, less than two points
            or a negative number of steps.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> layer = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> kind = lrjax.LoRA(2, init="small")
        >>> adapters = lrjax.adapt(layer, kind, key=jax.random.key(1))
        >>> x, y = jax.random.normal(jax.random.key(2), (50, 4)), jnp.arange(50) % 3
        >>> def log_likelihoods(own):
        ...     scores = jax.nn.log_softmax(jax.vmap(lrjax.bind(layer, own))(x))
        ...     return jnp.take_along_axis(scores, y[:, None], axis=1)[:, 0]
        >>> posterior = lrjax.adapters.isotropic_posterior(adapters)
        >>> found = lrjax.adapters.search_scale(
        ...     log_likelihoods, posterior, key=jax.random.key(3))
        >>> bool(found.nll_after <= 1.003 * found.nll_before)
        True

    Reference:
        H. Shi et al., "Training-free Bayesianization for low-rank adapters of large
        language models" (2024), arXiv:2412.05723.
    """
    check_key("search_scale", key)
    _check_bracket(bracket, points, steps)
    keys = jr.split(key, samples)
    at = lambda scale: eqx.tree_at(lambda p: p.scale, posterior, scale)

    def nll(log_scale: Array) -> Array:
        scaled = at(jnp.exp(log_scale))
        draw = lambda key: log_likelihoods(scaled.sample(key=key))
        each = jax.nn.logsumexp(jax.vmap(draw)(keys), axis=0)
        value = -jnp.mean(each - jnp.log(samples))
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    before = -jnp.mean(log_likelihoods(posterior.mean))
    lower, upper = (jnp.log(jnp.asarray(x, posterior.scale.dtype)) for x in bracket)
    gap = (upper - lower) / (points - 1)
    # The points and the bisection are one loop, so that the model is compiled once.
    first = (jnp.full(points, jnp.inf, before.dtype), upper, upper, before)

    def step(carry, index):
        values, low, high, its_nll = carry
        on_grid = index < points
        point = jnp.where(on_grid, lower + index * gap, (low + high) / 2)
        value = nll(point)
        at_index = jnp.minimum(index, points - 1)
        values = jnp.where(on_grid, values.at[at_index].set(value), values)
        last, its_last = _last_that_holds(values, before, tolerance)
        holds = value <= _limit(values, before, tolerance)
        put = lambda grid, found, old: jnp.where(
            on_grid, grid, jnp.where(found, point, old)
        )
        low, high = (
            put(lower + last * gap, holds, low),
            put(lower + (last + 1) * gap, ~holds, high),
        )
        its_nll = jnp.where(on_grid, its_last, jnp.where(holds, value, its_nll))
        return (values, low, high, its_nll), None

    (values, best, _, after), _ = lax.scan(step, first, jnp.arange(points + steps))
    last, _ = _last_that_holds(values, before, tolerance)
    at_lower, at_upper = last < 0, last == points - 1
    ends = jnp.where(at_lower, -jnp.inf, jnp.where(at_upper, upper, best))
    after = jnp.select([at_lower, at_upper], [before, values[-1]], after)
    scale = jnp.exp(ends)
    least = jnp.minimum(before, jnp.min(values))
    trusted = jnp.isfinite(before) & ~at_lower & ~at_upper
    return ScaleSearch(at(scale), scale, before, least, after, at_lower, at_upper, trusted)


def _limit(values: Array, before: Array, tolerance: ArrayLike) -> Array:
    least = jnp.minimum(before, jnp.min(values))
    return least + tolerance * jnp.abs(least)


def _last_that_holds(
    values: Float[Array, " g"], before: Array, tolerance: ArrayLike
) -> tuple[Array, Array]:
    """The last point, from the best one on, up to which all hold; −1 for none."""
    count = len(values)
    best = jnp.where(jnp.min(values) < before, jnp.argmin(values), -1)
    holds = values <= _limit(values, before, tolerance)
    beyond = ~holds & (jnp.arange(count) > best)
    last = jnp.where(jnp.any(beyond), jnp.argmax(beyond), count) - 1
    return last, values[last]


def _by_singular_vectors(
    path: str, own: Adapter, pool: Pool | None
) -> tuple[Factors, Float[Array, "*b k"]]:
    """The same change with ``left = U diag(d)``, and the deviations of ``right``."""
    found = stacked_factors(own, pool)
    if found is None:
        raise ValueError(
            f"The adapter at {path!r} is a {type(own).__name__}, whose change is no "
            "product of two factors that noise could go into: take the nearest that is, "
            "lrjax.adapters.as_lora(adapters, model, rank=…), first."
        )
    pair, scale = found
    wide = lambda x: x.astype(working_dtype(x.dtype))
    left = wide(pair.left) * wide(scale)[..., None, None]
    u, values, v = truncated_svd(left, min(left.shape[-2:]))
    pair = LowRank(u * values[..., None, :], times(wide(pair.right), v))
    ones = jnp.ones(pair.left.shape[:-2], pair.dtype)
    new = Factors(pair, None, ones, own.dropout_rate(), "both")
    return new, 1 / (values + FLOOR)


def _around(own: Adapter, new: Factors) -> Adapter:
    """A new adapter of the weight beside the bias of the old one."""
    return (
        Biased(own=own.own, inner=_around(own.inner, new))
        if isinstance(own, Biased)
        else new
    )


def _check_bracket(bracket: tuple[Any, Any], points: int, steps: int) -> None:
    known = [x for x in bracket if not isinstance(x, Tracer)]
    positive = np.all(np.asarray(known, float) > 0)
    increasing = len(known) < 2 or known[0] < known[1]
    if not (positive and increasing and points >= 2 and steps >= 0):
        raise ValueError(
            "search_scale needs a bracket of two positive scales, the smaller one first, "
            f"and at least two points; got {bracket}, points={points} and steps={steps}."
        )
