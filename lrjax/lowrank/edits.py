"""The least change of a linear map that gives some inputs new outputs."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from ..linalg import eigh, nonzero, svd, times, working_dtype
from .nodes import LowRank


def edit_weight(
    weight: Float[Array, "*b m n"],
    keys: Float[Array, "*_b _k _n"],
    values: Float[Array, "*_b _k _m"],
    second_moment: Float[Array, "*_b _n _n"],
    *,
    ridge: ArrayLike = 0.0,
) -> LowRank:
    """The change of a weight after which it maps keys to values, and all else least anew.

    ``Δ`` minimizes ``tr(Δ C Δᵀ)``, the mean squared change of the outputs under inputs of
    second moment C, where ``(W + Δ) Kᵀ = Vᵀ``; with a ridge ``λ`` it minimizes ``λ tr(Δ C
    Δᵀ) + ‖(W + Δ) Kᵀ − Vᵀ‖²`` instead::

        Δ = (Vᵀ − W Kᵀ) (λ I + K C⁻¹ Kᵀ)⁻¹ K C⁻¹

    One key gives ``(v − W k) (C⁻¹k)ᵀ / (kᵀC⁻¹k)``. Add it to the weight, or train on from
    it as the pair of an adapter.

    Args:
        weight: W, which maps an input x to ``W x``.
        keys: K, an input in each row.
        values: V, in the same rows what they shall be mapped to.
        second_moment: C, the mean of ``x xᵀ`` or the sum, symmetric and positive
            semidefinite. Directions that it has no weight for are free to change.
        ridge: λ, in the units of ``kᵀC⁻¹k``: how much is given up of the keys.

    Returns:
        ``Δ`` of width ``min(k, n)``, in float32 or wider. Not
        differentiated through.

    Raises:
        ValueError: for shapes that do not fit each other.

    Example:
        >>> import jax.numpy as jnp
        >>> from lrjax.lowrank import edit_weight
        >>> weight, moment = jnp.eye(2), jnp.diag(jnp.array([9.0, 1.0]))
        >>> key, value = jnp.array([[1.0, 1.0]]), jnp.array([[5.0, 1.0]])
        >>> change = edit_weight(weight, key, value, moment)
        >>> print((weight + change.materialize()).round(4))
        [[1.4 3.6]
         [0.  1. ]]

    Reference:
        K. Meng, D. Bau, A. Andonian, Y. Belinkov, "Locating and editing factual
        associations in GPT" (2022), arXiv 2202.05262; Y. Tewel, R. Gal, G. Chechik,
        Y. Atzmon, "Key-locked rank one editing for text-to-image personalization" (2023),
        arXiv 2305.01644; with a ridge: K. Meng, A. Sen Sharma, A. Andonian, Y. Belinkov,
        D. Bau, "Mass-editing memory in a transformer" (2022), arXiv 2210.07229.
    """
    *batch, m, n = weight.shape
    count = keys.shape[-2]
    wanted = {
        "keys": (keys, (*batch, count, n)),
        "values": (values, (*batch, count, m)),
        "second_moment": (second_moment, (*batch, n, n)),
    }
    for name, (given, shape) in wanted.items():
        if given.shape != shape:
            raise ValueError(
                f"edit_weight of a weight {weight.shape} by {count} keys needs {name} of "
                f"shape {shape}, got {given.shape}."
            )
    dtype = working_dtype(jnp.result_type(weight, keys, values))
    weight, keys, values, c = (
        lax.stop_gradient(x).astype(dtype) for x in (weight, keys, values, second_moment)
    )
    eps = jnp.finfo(dtype).eps
    spectrum, axes = eigh(c)
    # Rounding leaves values of this size, of either sign, where there is no weight.
    floor = eps * n * nonzero(spectrum[..., -1:])
    whitener = axes / jnp.sqrt(jnp.maximum(spectrum, floor))[..., None, :]
    u, size, vt = svd(times(keys, whitener))
    # Keys that say a thing twice have no weight for the difference of their values.
    told = size > eps * max(n, count) * size[..., :1]
    gain = size / jnp.where(told, size**2 + jnp.asarray(ridge, dtype), 1)
    gain = jnp.where(told, gain, 0)[..., None, :]
    residual = values.mT - times(weight, keys.mT)
    return LowRank(times(residual, u) * gain, times(whitener, vt.mT))
