"""Weights of a mixture that are known before the layers are called, for ``select``."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..._arguments import check_key


def softmax_weights(
    scores: Float[Array, "... k"],
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
) -> Float[Array, "... k"]:
    """Weights of a mixture from scores: positive numbers that add up to one.

        w_i = exp(s_i / T) / Σ_j exp(s_j / T),   both among the largest scores alone

    The scores may come from anything that is known of an example. RecLoRA takes what a
    model of clicks knows of a user: with its embedding ``u (d,)`` and a trained matrix
    ``P (k, d)`` they are ``s = P u``.

    Args:
        scores: ``(..., k)``, one for each adapter.
        temperature: ``T``, positive: small ones choose, large ones take the mean.
        top_k: how many weights are not zero, all of them by default.

    Returns:
        ``(..., k)``, for :func:`lrjax.adapters.select`. The weights have gradients.

    Raises:
        ValueError: for a ``top_k`` below one.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> keys = jax.random.split(jax.random.key(1), 2)
        >>> two = [lrjax.adapt(model, lrjax.LoRA(2), key=k) for k in keys]
        >>> stack = lrjax.adapters.stack(two, model)
        >>> users, projection = jnp.ones((5, 8)), jnp.zeros((2, 8))
        >>> def answer(user, x):
        ...     weights = lrjax.adapters.softmax_weights(projection @ user)
        ...     return lrjax.bind(model, lrjax.adapters.select(stack, [1, 2], weights))(x)
        >>> jax.vmap(answer)(users, jnp.ones((5, 4))).shape
        (5, 3)

    Reference:
        J. Zhu et al., "Lifelong personalized low-rank adaptation of large language models
        for recommendation" (2024), arXiv:2408.03533. With equal scores it is the mean.
    """
    scores = scores / temperature
    if top_k is None or top_k >= scores.shape[-1]:
        return jax.nn.softmax(scores, axis=-1)
    return jax.nn.softmax(
        jnp.where(among_largest(scores, top_k), scores, -jnp.inf), axis=-1
    )


def among_largest(scores: Float[Array, "... k"], count: int) -> Array:
    """Which scores are among the largest; of equal ones the first."""
    if count < 1:
        raise ValueError(f"top_k must be at least 1, got {count}.")
    if count >= scores.shape[-1]:
        return jnp.ones(scores.shape, bool)
    index = lax.top_k(lax.stop_gradient(scores), count)[1]
    return jnp.any(jax.nn.one_hot(index, scores.shape[-1], dtype=bool), axis=-2)


def feature_weights(
    features: ArrayLike,
    *,
    rate: ArrayLike = 0.0,
    key: PRNGKeyArray | None = None,
    scaled: bool = False,
) -> Float[Array, "... k"]:
    """Weights of a mixture with an adapter for each feature of the data.

        ΔW = Σ_f m_f φ_f ΔW_f,   m_f zero with the probability ``rate``, else one

    ``φ`` says which features an example has: its language and its task, say. The adapters
    are trained together, and an example of a new pair of features is met by the sum of
    theirs. Features are dropped in training, so that each adapter also works without the
    others; where all are dropped, it is the model.

    Args:
        features: ``(..., k)``, zeros and ones, or any weights.
        rate: the probability with which a feature of an example is dropped.
        key: of what is dropped; without one nothing is, as for evaluation. It is one key
            for all leading axes: every example drops its own features.
        scaled: whether the others grow by ``1 / (1 − rate)``, so that the mean of the
            change is that of all features; else a feature that is kept counts as it does
            in evaluation.

    Returns:
        ``(..., k)``, for :func:`lrjax.adapters.select`.

    Raises:
        ValueError: for a rate outside [0, 1).
        TypeError: for what is no key.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
        >>> keys = jax.random.split(jax.random.key(1), 4)
        >>> each = {name: lrjax.adapt(model, lrjax.LoRA(2), key=k)
        ...     for name, k in zip(("German", "Thai", "asks", "sums up"), keys)}
        >>> stack = lrjax.adapters.stack(each, model)
        >>> features = jnp.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
        >>> weights = lrjax.adapters.feature_weights(
        ...     features, rate=0.3, key=jax.random.key(2))
        >>> def answer(weights, x):
        ...     chosen = lrjax.adapters.select(stack, list(each), weights)
        ...     return lrjax.bind(model, chosen)(x)
        >>> jax.vmap(answer)(weights, jnp.ones((2, 4))).shape
        (2, 3)

    Reference:
        C.-C. Lin et al., "Inducing generalization across languages and tasks using
        featurized low-rank mixtures" (2024), arXiv:2402.17934.
    """
    check_key("feature_weights", key)
    if not isinstance(rate, Tracer) and not np.all(
        (np.asarray(rate) >= 0) & (np.asarray(rate) < 1)
    ):
        raise ValueError(f"feature_weights needs a rate in [0, 1), got {rate!r}.")
    features = jnp.asarray(features, jnp.result_type(float))
    if key is None:
        return features
    kept = jr.uniform(key, features.shape) >= rate
    size = 1 / (1 - rate) if scaled else 1.0
    return jnp.where(kept, features * size, 0.0)
