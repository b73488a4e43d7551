from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..linalg import nonzero, working_dtype


Logits = Float[Array, "n c"]
Labels = Int[Array, " labels"]


def negative_log_likelihood(
    logits: Logits, labels: Labels, weights: ArrayLike | None = None
) -> Float[Array, ""]:
    """``−Σ_i w_i log p_i(y_i) / Σ_i w_i``, in nats, with ``p = softmax(logits)``.

    Args:
        logits: ``(n, c)``; logarithms of probabilities are logits too, so that of the mean
            of predictions it is ``jnp.log(mean)``.
        labels: ``(n,)``, whole numbers from 0 to c − 1.
        weights: ``(n,)``, not negative; zeros mask. Masked rows may hold anything.

    Returns:
        A number; zero without examples.

    Raises:
        ValueError: for labels or weights of another length, or labels out of range.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
        >>> nll = lrjax.metrics.negative_log_likelihood(logits, jnp.array([0, 1]))
        >>> print(nll.round(4), (-jnp.log(0.5) - jnp.log(0.75)).round(4) / 2)
        0.4904 0.4904
    """
    logits, weights = _checked("negative_log_likelihood", logits, labels, weights)
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return -_mean(own, weights)


def brier_score(
    logits: Logits, labels: Labels, weights: ArrayLike | None = None
) -> Float[Array, ""]:
    """``Σ_i w_i Σ_c (p_ic − [c = y_i])² / Σ_i w_i``: from 0 to 2, all classes counted.

    Of two classes it is twice the squared error of the probability of one of them.

    Args:
        logits: ``(n, c)``, or logarithms of probabilities.
        labels: ``(n,)``, whole numbers from 0 to c − 1.
        weights: ``(n,)``, not negative; zeros mask.

    Returns:
        A number; zero without examples.

    Raises:
        ValueError: as :func:`negative_log_likelihood`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> logits = jnp.log(jnp.array([[0.25, 0.75]]))
        >>> print(lrjax.metrics.brier_score(logits, jnp.array([1])))
        0.125

    Reference:
        G. W. Brier, "Verification of forecasts expressed in terms of probability" (1950),
        Monthly Weather Review.
    """
    logits, weights = _checked("brier_score", logits, labels, weights)
    right = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return _mean(jnp.sum((jax.nn.softmax(logits) - right) ** 2, axis=1), weights)


class ReliabilityBins(NamedTuple):
    """Predictions by their confidence: what a reliability diagram shows.

    Attributes:
        edges: the confidences that bins begin and end at.
        share: how much of all weight is in a bin.
        confidence: the mean largest probability in it; zero in an empty bin.
        accuracy: the share in it that is right; zero in an empty bin.
    """

    edges: Float[Array, " b1"]
    share: Float[Array, " b"]
    confidence: Float[Array, " b"]
    accuracy: Float[Array, " b"]


def reliability_bins(
    logits: Logits,
    labels: Labels,
    weights: ArrayLike | None = None,
    *,
    bins: int = 15,
    equal_mass: bool = False,
) -> ReliabilityBins:
    """How often predictions of a confidence are right.

    The confidence of an example is its largest probability, and it is right where this is
    that of its label. Bin k of b has the confidences in ``(k/b, (k + 1)/b]``, or with
    ``equal_mass`` as much weight as the others: an example belongs to the bin that the
    middle of its weight falls into when all are sorted. Among equals the order decides.

    Args:
        logits: ``(n, c)``, or logarithms of probabilities.
        labels: ``(n,)``, whole numbers from 0 to c − 1.
        weights: ``(n,)``, not negative; zeros mask.
        bins: b.
        equal_mass: bins of equal weight in place of equal width.

    Returns:
        The bins. Draw ``accuracy`` over ``confidence`` where ``share`` is positive.

    Raises:
        ValueError: for less than one bin, and as :func:`negative_log_likelihood`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> logits = jnp.log(jnp.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]]))
        >>> found = lrjax.metrics.reliability_bins(logits, jnp.array([0, 1, 1]), bins=2)
        >>> print(found.share, found.accuracy.round(3))
        [0. 1.] [0.    0.667]

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural
        networks" (2017), arXiv 1706.04599.
    """
    if bins < 1:
        raise ValueError(f"reliability_bins needs at least one bin, got {bins}.")
    logits, weights = _checked("reliability_bins", logits, labels, weights)
    confidence = jnp.max(jax.nn.softmax(logits), axis=1)
    right = (jnp.argmax(logits, axis=1) == labels).astype(logits.dtype)
    total = jnp.sum(weights)
    edges = jnp.linspace(0, 1, bins + 1, dtype=logits.dtype)
    if equal_mass:
        order = jnp.argsort(jnp.where(weights > 0, confidence, jnp.inf))
        upto = jnp.cumsum(weights[order])
        middle = (upto - weights[order] / 2) / nonzero(total)
        sorted_bins = jnp.clip((bins * middle).astype(int), 0, bins - 1)
        index = jnp.zeros_like(sorted_bins).at[order].set(sorted_bins)
        edges = _mass_edges(confidence, index, weights, bins)
    else:
        index = jnp.clip(jnp.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    summed = lambda x: jax.ops.segment_sum(weights * x, index, num_segments=bins)
    mass = summed(jnp.ones_like(confidence))
    of_each = lambda x: summed(x) / nonzero(mass)
    return ReliabilityBins(
        edges, mass / nonzero(total), of_each(confidence), of_each(right)
    )


def expected_calibration_error(
    logits: Logits,
    labels: Labels,
    weights: ArrayLike | None = None,
    *,
    bins: int = 15,
    equal_mass: bool = False,
) -> Float[Array, ""]:
    """``Σ_k share_k |accuracy_k − confidence_k|`` over bins of confidence.

    Of n examples that are calibrated perfectly it is not zero but some ``√(b/n)``: compare
    only values of as many examples and bins.

    Args:
        logits: ``(n, c)``, or logarithms of probabilities.
        labels: ``(n,)``, whole numbers from 0 to c − 1.
        weights: ``(n,)``, not negative; zeros mask.
        bins: b, as of :func:`reliability_bins`.
        equal_mass: bins of equal weight in place of equal width.

    Returns:
        A number between 0 and 1; with one bin ``|accuracy − mean confidence|``.

    Raises:
        ValueError: as :func:`reliability_bins`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2]]))
        >>> labels = jnp.array([0, 1])
        >>> print(lrjax.metrics.expected_calibration_error(logits, labels).round(4))
        0.3

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural
        networks" (2017), arXiv 1706.04599; of equal mass: J. Nixon et al., "Measuring
        calibration in deep learning" (2019), arXiv 1904.01685.
    """
    found = reliability_bins(logits, labels, weights, bins=bins, equal_mass=equal_mass)
    return jnp.sum(found.share * jnp.abs(found.accuracy - found.confidence))


class TemperatureFit(NamedTuple):
    """A temperature, and what it does to the examples that it was fitted on.

    Attributes:
        temperature: T; divide logits by it.
        nll_before: the negative log-likelihood at ``T = 1``.
        nll_after: that at ``temperature``.
        converged: whether it is a minimum. Where all predictions are right, colder is
            always better, and where they are worse than chance, hotter is: no minimum.
    """

    temperature: Float[Array, ""]
    nll_before: Float[Array, ""]
    nll_after: Float[Array, ""]
    converged: Bool[Array, ""]


def fit_temperature(
    logits: Logits,
    labels: Labels,
    weights: ArrayLike | None = None,
    *,
    steps: int = 30,
) -> TemperatureFit:
    """The temperature of the least negative log-likelihood: ``softmax(logits / T)``.

    In ``β = 1/T`` it is convex, with the slope ``E[z] − z_y`` and the curvature ``Var[z]``
    under ``softmax(β z)``. Newton's steps, or a bisection of ``log β`` where these leave
    the bracket that the slopes give, which is at first ``10^±4`` over the logits' spread.

    Args:
        logits: ``(n, c)`` of examples that the model was not trained on.
        labels: ``(n,)``, whole numbers from 0 to c − 1.
        weights: ``(n,)``, not negative; zeros mask.
        steps: all are made, so that it can be jitted and mapped.

    Returns:
        The fit.

    Raises:
        ValueError: as :func:`negative_log_likelihood`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> logits = jnp.array([[4.0, 0.0]] * 4)  # sure, and right three times in four
        >>> fit = lrjax.metrics.fit_temperature(logits, jnp.array([0, 0, 0, 1]))
        >>> print(fit.temperature.round(4), (4 / jnp.log(3)).round(4), fit.converged)
        3.641 3.641 True

    Reference:
        C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural
        networks" (2017), arXiv 1706.04599.
    """
    logits, weights = _checked("fit_temperature", logits, labels, weights)
    centered = logits - jnp.mean(logits, axis=1, keepdims=True)
    spread = nonzero(jnp.sqrt(_mean(jnp.mean(centered**2, axis=1), weights)))
    z = centered / spread
    own = jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]

    def slopes(beta: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(beta * z)
        mean = jnp.sum(p * z, axis=1)
        variance = jnp.sum(p * (z - mean[:, None]) ** 2, axis=1)
        return _mean(mean - own, weights), _mean(variance, weights)

    def step(_, carry):
        beta, low, high = carry
        slope, curvature = slopes(beta)
        low, high = jnp.where(slope <= 0, beta, low), jnp.where(slope > 0, beta, high)
        newton = beta - slope / nonzero(curvature)
        inside = (newton > low) & (newton < high) & (curvature > 0)
        return jnp.where(inside, newton, jnp.sqrt(low * high)), low, high

    one = jnp.ones((), z.dtype)
    start = (jnp.clip(spread, 1e-3, 1e3), 1e-4 * one, 1e4 * one)
    beta, *_ = lax.fori_loop(0, steps, step, start)
    slope, curvature = slopes(beta)
    # Newton's next step would be less than this part of beta, and its error the square.
    rounding = jnp.sqrt(jnp.finfo(z.dtype).eps)
    converged = (jnp.abs(slope) <= rounding * beta * curvature) & (curvature > 0)
    temperature = spread / beta
    nll = lambda t: negative_log_likelihood(logits / t, labels, weights)
    return TemperatureFit(temperature, nll(one), nll(temperature), converged)


def _checked(
    function: str, logits: Any, labels: Any, weights: Any
) -> tuple[Logits, Float[Array, " n"]]:
    """Logits in float32 or wider, those without weight zero, and weights."""
    count, classes = logits.shape
    weights = jnp.ones(count) if weights is None else jnp.asarray(weights)
    if labels.shape != (count,) or weights.shape != (count,):
        raise ValueError(
            f"{function} got logits of {count} examples, labels of shape {labels.shape} "
            f"and weights of shape {weights.shape}: one label and one weight for each."
        )
    known = not isinstance(labels, Tracer) and not isinstance(weights, Tracer)
    if known:
        used = np.asarray(labels)[np.asarray(weights) > 0]
        if np.any((used < 0) | (used >= classes)):
            raise ValueError(
                f"{function} got logits of {classes} classes and labels from {used.min()} "
                f"to {used.max()}: labels are whole numbers from 0 to {classes - 1}."
            )
    dtype = working_dtype(logits.dtype)
    logits = jnp.where((weights > 0)[:, None], logits.astype(dtype), 0)
    return logits, weights.astype(dtype)


def _mean(x: Float[Array, " n"], weights: Float[Array, " n"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(weights > 0, weights * x, 0)) / nonzero(jnp.sum(weights))


def _mass_edges(
    confidence: Float[Array, " n"], index: Array, weights: Array, bins: int
) -> Float[Array, " b1"]:
    """Bins end at the largest confidence in them; an empty one where it begins."""
    own = jnp.where(weights > 0, confidence, 0)
    ends = jax.ops.segment_max(own, index, num_segments=bins)
    ends = lax.cummax(jnp.maximum(ends, 0))
    return jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
