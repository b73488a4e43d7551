from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .rank import numerical_rank


def local_rank(
    layer: Callable[[Array], Array],
    x: Float[Array, "count ..."],
    *,
    tol: ArrayLike | None = None,
) -> Float[Array, ""]:
    """The mean numerical rank of the Jacobian of a layer with respect to its input.

    ``E_x rank(∂ layer(x) / ∂x)``: how many dimensions of the input a map still tells apart
    around the data. Of linear layers it is the rank of their product; it is never more than
    the smallest rank on the way.

    One backward pass for each output of each sample, all at once: hand over a few
    hundred samples.

    Args:
        layer: from one input to the numbers of a layer, its own and all before it.
        x: inputs.
        tol: see :func:`numerical_rank`.

    Returns:
        The mean over the inputs.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> weight = jnp.diag(jnp.array([1.0, 2.0, 0.0]))
        >>> layer = lambda x: jax.nn.relu(weight @ x)
        >>> print(lrjax.metrics.local_rank(layer, jnp.array([[1.0, 1, 1], [1, -1, 1]])))
        1.5

    Reference:
        N. Patel, R. Shwartz-Ziv, "Learning to compress: local rank and information
        compression in deep neural networks" (2024), arXiv 2410.07687.
    """

    def rank(x: Array) -> Array:
        jacobian = jax.jacrev(lambda x: layer(x).reshape(-1))(x)
        return numerical_rank(jacobian.reshape(jacobian.shape[0], -1), tol)

    return jnp.mean(jax.vmap(rank)(x).astype(x.dtype))
