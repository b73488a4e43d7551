import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def latent_volume(
    z: Float[Array, "samples *b n"], offset: ArrayLike = 1.0
) -> Float[Array, "*b"]:
    """The mean size of the box around latent codes: a penalty that empties its axes.

    ``Π_i (s_i + offset)^{1/n}`` of the standard deviations ``s_i`` of the n coordinates.
    Beside the loss of an autoencoder it flattens the codes along as many axes as the data
    do without, those with ``s_i ≈ 0``, if the decoder cannot undo that by its own scale:
    bound its Lipschitz constant, by spectral norms say.

    The rank of a *linear* layer between encoder and decoder is penalized by
    ``add_nuclear_norm(weight, where=…)``.

    Args:
        z: codes, ``(samples, *b, n)``.
        offset: keeps the gradient finite where an axis is empty, above 0.

    Returns:
        ``(*b,)``, differentiable.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> z = jnp.array([[1.0, 3.0, 5.0], [-1.0, -3.0, 5.0]])
        >>> print(lrjax.metrics.latent_volume(z).round(4))  # (2 · 4 · 1)^⅓
        2.0

    Reference:
        Q. Chen, M. Fuge, "Compressing latent space via least volume" (2024), arXiv
        2404.17773; the linear layer: A. Mazumder et al., "Learning low-rank latent spaces
        with simple deterministic autoencoder: theoretical and empirical insights" (2023),
        arXiv 2310.16194.
    """
    variance = jnp.var(z, axis=0)
    some = variance > 0
    # The root of zero has no gradient.
    size = jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1)), 0)
    return jnp.exp(jnp.mean(jnp.log(size + jnp.asarray(offset, z.dtype)), axis=-1))
