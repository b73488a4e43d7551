from typing import Literal, get_args

import optax
from jaxtyping import PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real
from ..._widths import Growth, Sides, Widths


Optimizer = Literal["adam", "sgd"]


@checks_trees
def scale_by_width(
    base: PyTree, optimizer: Optimizer = "adam", *, axes: Sides | None = None
) -> optax.GradientTransformation:
    """Give each leaf the learning rate of its width: what is best for ``base`` stays best.

    For a layer ``y = W x`` whose inputs and outputs are ``k_in`` and ``k_out`` times those
    of the same layer in ``base``, an update ``U`` becomes::

        U / k_in              after Adam, whose entries have one size at every width
        U · k_out / k_in      after SGD and momentum

    so that a step changes every output by as much as it does in ``base``, however many
    inputs are summed over (the maximal-update parameterization, μP). Which layer is an
    input, hidden or output layer needs not to be told: an input layer has grown in
    ``k_out`` alone, an output layer in ``k_in`` alone. Biases, scales of norms and other
    vectors have ``k_in = 1``. The start has to be scaled as well:
    :func:`lrjax.nn.scale_init_by_width`.

    A :class:`lrjax.LowRank` node is two layers: ``rightᵀ (r, in)`` and then
    ``left (out, r)``. With one rank for all widths the rate of ``right`` shrinks as its
    inputs grow, and that of ``left`` does not: so do the rates of LoRA+.

    Place it after the moments and before weight decay and the rate:
    ``optax.chain(optax.scale_by_adam(), lrjax.scale_by_width(base), …)``. Entries of
    gradients shrink as widths grow: keep Adam's eps far below them. In attention the
    heads may grow in number; if they grow in size, divide the scores by the size, not by
    its root.

    Args:
        base: the parameters for which the rate was found, or their shapes
            (``jax.eval_shape``): the same tree with other widths. In modules of Equinox
            layers are told by their class; arrays elsewhere are ``(out, in)``, and
            ``(in, out)`` if called ``kernel`` or ``embedding``.
        optimizer: what comes before: ``"adam"``, or another whose step does not change
            with the size of the gradient, or ``"sgd"``.
        axes: ``(path, shape) -> lrjax.MatrixSpec`` or ``None``: of leaves whose outputs
            (``rows``) and inputs (``cols``) are other axes than these.

    Returns:
        A stateless optax transform.

    Raises:
        ValueError: for an unknown optimizer, or a node with orthonormal factors in
            ``base``; in ``init``, for a leaf that ``base`` does not have, or whose axes
            that are neither outputs nor inputs have grown.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, optax, lrjax
        >>> def params(width):
        ...     model = eqx.nn.MLP(4, 3, width, 2, key=jax.random.key(0))
        ...     return eqx.filter(model, eqx.is_inexact_array)
        >>> tx = lrjax.scale_by_width(params(8))
        >>> wide = params(32)
        >>> step, _ = tx.update(jax.tree.map(jnp.ones_like, wide), tx.init(wide))
        >>> [float(layer.weight[0, 0]) for layer in step.layers]
        [1.0, 0.25, 0.25]

    Reference:
        G. Yang, E. Hu, "Feature learning in infinite-width neural networks" (2020), arXiv
        2011.14522; G. Yang et al., "Tensor programs V: tuning large neural networks via
        zero-shot hyperparameter transfer" (2022), arXiv 2203.03466. Of the two factors of
        a node: derived here.
    """
    if optimizer not in get_args(Optimizer):
        raise ValueError(
            f"optimizer must be one of {get_args(Optimizer)}, got {optimizer!r}."
        )
    widths = Widths("scale_by_width", base, axes)
    rate = {
        "adam": lambda growth: 1 / growth.inputs,
        "sgd": lambda growth: growth.outputs / growth.inputs,
    }[optimizer]

    def init(params):
        check_real("scale_by_width", params)
        widths.map(lambda growth, x, path: None, params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params

        def scale(growth: Growth, u, path):
            del path
            return u * rate(growth)

        return widths.map(scale, updates), state

    return optax.GradientTransformation(init, update)
