import math

import jax.numpy as jnp
from jaxtyping import PyTree

from .._matrices import named_leaves
from .._widths import Growth, Sides, Widths
from ..linalg import nonzero, working_dtype


def scale_init_by_width(
    model: PyTree, base: PyTree, *, axes: Sides | None = None
) -> PyTree:
    """Scale the start of a model to its widths, so that a rate found for ``base`` fits it.

    With inputs and outputs ``k_in`` and ``k_out`` times those of the same layer in
    ``base``, the root mean square of its entries becomes that of ``base`` times::

        k_in^(−1/2) · min(1, (k_out / k_in)^(1/2))

    the largest for which an input of entries of size one gives an output of such, whether
    it has met the layer at random or the layer has learned it: the spectral norm then grows
    as ``(out / in)^(1/2)``. For hidden layers that is the usual start, output layers start
    smaller by ``k_in^(−1/2)``, and biases as in ``base``. A :class:`lrjax.LowRank` node is
    two layers, ``rightᵀ`` and ``left``. What is zero stays zero. Trained with
    :func:`lrjax.scale_by_width`.

    Args:
        model: a model, or parameters, or adapters, at the start; leaves that are no real
            arrays stay.
        base: the same with the widths for which the rate was found, drawn by the same
            rules, with its arrays: their sizes are measured.
        axes: as of :func:`lrjax.scale_by_width`.

    Returns:
        The model with its leaves scaled.

    Raises:
        ValueError: for a leaf that ``base`` does not have, or whose axes that are neither
            outputs nor inputs have grown; for nodes with orthonormal factors.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = lambda width: eqx.nn.MLP(4, 3, width, 2, key=jax.random.key(0))
        >>> wide = lrjax.nn.scale_init_by_width(model(512), model(32))
        >>> size = lambda layer: (layer.weight**2).mean() ** 0.5
        >>> print((size(wide.layers[2]) / size(model(32).layers[2])).round(4))  # 1 / 16
        0.0625

    Reference:
        G. Yang et al., "Tensor programs V: tuning large neural networks via zero-shot
        hyperparameter transfer" (2022), arXiv 2203.03466, table 3. The one rule for all
        layers, and for factors, is derived here.
    """
    widths = Widths("scale_init_by_width", base, axes)
    sizes = {path: x for path, x in named_leaves(base)[0]}

    def scale(growth: Growth, x, path):
        wanted = growth.inputs**-0.5 * min(1.0, math.sqrt(growth.outputs / growth.inputs))
        size = wanted * _size(sizes[path]) / nonzero(_size(x))
        return (x * size).astype(x.dtype)

    return widths.map(scale, model)


def _size(x):
    """The root mean square of the entries."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(working_dtype(x.dtype)))))
