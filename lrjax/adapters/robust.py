"""Robust fine-tuning: natural examples train adapters, adversarial ones the model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_key
from .._matrices import named_leaves
from .binding import bind
from .protocol import Adapters


def natural_branch(
    model: PyTree, adapters: Adapters, *, shared: Callable[[str], bool]
) -> PyTree:
    """The model with its adapters, whose gradients reach the adapters and a shared part.

    For a model that is trained as well, by other examples: through this branch nothing
    changes in it but what both have in common, as the head. The value is that of
    :func:`lrjax.bind`.

    Args:
        model: the module that :func:`lrjax.adapt` saw.
        adapters: all of them.
        shared: of the path of an array of the model, as ``"layers.2.weight"``, whether it
            is trained by this branch.

    Returns:
        A model of the same structure above the layers.

    Raises:
        ValueError: as :func:`lrjax.bind`.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
        >>> adapters = lrjax.adapt(
        ...     model, lrjax.LoRA(2), where=["layers.0"], key=jax.random.key(1))
        >>> head = lambda path: path.startswith("layers.1")
        >>> @eqx.filter_grad
        ... def slope(model):
        ...     natural = lrjax.adapters.natural_branch(model, adapters, shared=head)
        ...     return jnp.sum(natural(jnp.ones(4)))
        >>> [bool(jnp.any(layer.weight != 0)) for layer in slope(model).layers]
        [False, True]

    Reference:
        X. Xu, J. Zhang, M. Kankanhalli, "AutoLoRa: a parameter-free automated robust
        fine-tuning framework" (2023), arXiv 2310.01818.
    """
    leaves, structure = named_leaves(model)
    still = [
        leaf if shared(path) or not hasattr(leaf, "dtype") else lax.stop_gradient(leaf)
        for path, leaf in leaves
    ]
    return bind(structure.unflatten(still), adapters)


def disentangled_loss(
    natural: Float[Array, "*b classes"],
    adversarial: Float[Array, "*b classes"],
    labels: Int[Array, "*b"],
    natural_weight: ArrayLike,
    consistency_weight: ArrayLike,
) -> Float[Array, ""]:
    """The loss of robust fine-tuning in two branches.

    ``λ₁ CE(p, y) + (1 − λ₁) CE(q, y) + λ₂ KL(p ‖ q)``, averaged over examples, with the
    predictions ``p`` of :func:`natural_branch` for the examples and ``q`` of the model
    alone for :func:`adversarial_inputs`. So adapters are trained by what is natural and the
    model by what is adversarial, and in neither the two pull against each other; the
    divergence pulls both branches together.

    Args:
        natural: logits of the natural branch.
        adversarial: logits of the model for adversarial inputs.
        labels: the classes.
        natural_weight: ``λ₁``.
        consistency_weight: ``λ₂``; both from :func:`disentangled_weights`.

    Returns:
        A number.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> same, labels = jnp.zeros((5, 4)), jnp.zeros(5, int)
        >>> print(lrjax.adapters.disentangled_loss(same, same, labels, 0.3, 6.0).round(4))
        1.3863

    Reference:
        X. Xu, J. Zhang, M. Kankanhalli, "AutoLoRa: a parameter-free automated robust
        fine-tuning framework" (2023), arXiv 2310.01818.
    """
    entropy = optax.softmax_cross_entropy_with_integer_labels
    share = natural_weight * entropy(natural, labels)
    share = share + (1 - natural_weight) * entropy(adversarial, labels)
    target, log_q = jax.nn.softmax(natural), jax.nn.log_softmax(adversarial)
    divergence = jnp.sum(target * (jax.nn.log_softmax(natural) - log_q), axis=-1)
    return jnp.mean(share + consistency_weight * divergence)


def disentangled_weights(
    natural_accuracy: ArrayLike, scale: ArrayLike = 6.0
) -> tuple[Array, Array]:
    """How much each part of :func:`disentangled_loss` counts, by what is learned already.

    ``λ₁ = 1 − a`` and ``λ₂ = scale · a`` for the accuracy ``a`` of the natural branch on
    training data: natural labels first, and the closer the branch comes to them, the more
    it is the teacher of the model. Taken anew every quarter of an epoch in the paper's
    code.

    Args:
        natural_accuracy: ``a``, between zero and one.
        scale: of the divergence.

    Returns:
        ``(λ₁, λ₂)``.

    Example:
        >>> import lrjax
        >>> [float(x) for x in lrjax.adapters.disentangled_weights(0.75)]
        [0.25, 4.5]

    Reference:
        X. Xu, J. Zhang, M. Kankanhalli, "AutoLoRa: a parameter-free automated robust
        fine-tuning framework" (2023), arXiv 2310.01818.
    """
    accuracy = jnp.asarray(natural_accuracy, float)
    return 1 - accuracy, jnp.multiply(scale, accuracy)


def adversarial_inputs(
    loss: Callable[[Array], Array],
    inputs: Float[Array, "*s"],
    *,
    key: PRNGKeyArray,
    radius: ArrayLike = 8 / 255,
    step_size: ArrayLike = 2 / 255,
    steps: int = 10,
    start: ArrayLike = 1e-3,
    low: ArrayLike = 0.0,
    high: ArrayLike = 1.0,
) -> Float[Array, "*s"]:
    """Inputs nearby whose loss is large, by projected steps along signs of the gradient.

    From ``x + start · N(0, 1)``, ``steps`` times::

        z ← clip(clip(z + step_size · sign(∇ loss(z)), x − radius, x + radius), low, high)

    Args:
        loss: of a batch of inputs, a number; a sum over examples that do not see each other
            moves each as if it were alone.
        inputs: ``x``.
        key: source of the start.
        radius: how far every number may move.
        step_size: of a step.
        steps: how many.
        start: the standard deviation of the start.
        low: the smallest number that an input may have.
        high: the largest one.

    Returns:
        ``z``, through which no gradient flows.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> loss = lambda x: x[0] - 2 * x[1]
        >>> x = jnp.full(2, 0.5)
        >>> z = lrjax.adapters.adversarial_inputs(
        ...     loss, x, radius=0.25, step_size=0.1, key=jax.random.key(0))
        >>> print(z)
        [0.75 0.25]

    Reference:
        A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards deep learning
        models resistant to adversarial attacks" (2017), arXiv 1706.06083; the start and the
        numbers are those of X. Xu, J. Zhang, M. Kankanhalli, "AutoLoRa: a parameter-free
        automated robust fine-tuning framework" (2023), arXiv 2310.01818.
    """
    check_key("adversarial_inputs", key)
    first = inputs + start * jr.normal(key, inputs.shape, inputs.dtype)

    def climb(_, z: Array) -> Array:
        z = z + step_size * jnp.sign(jax.grad(loss)(z))
        z = jnp.clip(z, inputs - radius, inputs + radius)
        return jnp.clip(z, low, high).astype(inputs.dtype)

    return lax.stop_gradient(lax.fori_loop(0, steps, climb, first))
