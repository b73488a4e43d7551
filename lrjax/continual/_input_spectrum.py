"""What a basis leaves of the inputs of a layer, and how much of it a rule takes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._sites import InputStatistic
from ..linalg import cross, eigh, nonzero, nystrom, outer, rounding, svd, times


class LeftOver(NamedTuple):
    """The spectrum of ``(I − M Mᵀ) C (I − M Mᵀ)``.

    Attributes:
        values: its eigenvalues, falling; those along M come last, and are negative.
        vectors: their directions, in columns.
        total: its trace, also of what a sketch does not see.
        of_inputs: ``Σ ‖x‖²``, without the ones of a bias.
        noise: an eigenvalue that is nothing but rounding.
        finite: whether the statistic is; if not it counts as zero.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "n k"]
    total: Float[Array, ""]
    of_inputs: Float[Array, ""]
    noise: Float[Array, ""]
    finite: Bool[Array, ""]


def left_over(
    basis: Float[Array, "n k"], one: InputStatistic, probe: Float[Array, "m s"] | None
) -> LeftOver:
    """What a basis leaves of inputs, of which the whole moment is known or a sketch."""
    assert one.image is not None
    image, total, energy, count = lax.stop_gradient(
        (one.image, one.total, one.energy, one.count)
    )
    finite = jnp.isfinite(jnp.sum(image) + jnp.sum(total) + energy)
    image, total, energy, count = (
        jnp.where(finite, x, 0).astype(basis.dtype) for x in (image, total, energy, count)
    )
    size = nonzero(energy + count)
    image, total, energy, count = (x / size for x in (image, total, energy, count))
    with_bias = len(basis) > len(total)
    whole = energy + count if with_bias else energy
    noise = rounding(basis.dtype, len(basis)) * whole
    if probe is None:
        moment = _with_ones(image, total, count) if with_bias else image
        values, vectors = _of_moment(basis, moment, whole)
        captured = jnp.sum(cross(basis, moment) * basis.T)
    else:
        probe = jnp.concatenate([basis[: len(probe)], probe], axis=1)
        if with_bias:
            image, probe = _sketch_with_ones(basis, image, probe, total, count)
        else:
            probe = probe.astype(basis.dtype)
        values, vectors, captured = _of_sketch(basis, image, probe)
    scaled = (values * size, vectors, (whole - captured) * size)
    return LeftOver(*scaled, energy * size, noise * size, finite)


def count_by_energy(
    rest: LeftOver, energy: ArrayLike
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The fewest directions that leave ``(1 − energy) Σ ‖x‖²``, and if more are needed."""
    allowed = (1 - jnp.asarray(energy)) * rest.of_inputs
    before = rest.total - jnp.cumsum(rest.values) + rest.values
    wanted = jnp.sum((before > allowed) & (rest.values > rest.noise))
    seen = jnp.sum(jnp.where(jnp.arange(len(rest.values)) < wanted, rest.values, 0))
    rounded = len(rest.values) * rest.noise  # each of those not taken may be that large
    return wanted, rest.total - seen > allowed + rounded


def count_by_smallest(
    rest: LeftOver, smallest: ArrayLike
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """All directions but those with ``λ ≤ smallest · λ_min``; no more are needed."""
    outside = jnp.where(rest.values > -rest.noise, rest.values, jnp.inf)
    least = jnp.asarray(smallest) * jnp.min(outside)
    wanted = jnp.sum(rest.values > jnp.maximum(least, rest.noise))
    return wanted, jnp.zeros((), bool)


def _with_ones(moment: Array, total: Array, count: Array) -> Array:
    """``Σ [x; 1] [x; 1]ᵀ``."""
    last = jnp.append(total, count)
    return jnp.concatenate([jnp.concatenate([moment, total[:, None]], axis=1), last[None]])


def _of_moment(basis: Array, moment: Array, size: Array) -> tuple[Array, Array]:
    for _ in range(2):  # the second time takes what rounding left of the first
        rest = moment - times(basis, cross(basis, moment))
        moment = rest - outer(times(rest, basis), basis)
    # Below all others, where they mix with none of them.
    shifted = (moment + moment.T) / 2 - size * outer(basis, basis)
    values, vectors = eigh(shifted)
    return values[::-1], vectors[:, ::-1]


def _sketch_with_ones(
    basis: Array, image: Array, probe: Array, total: Array, count: Array
) -> tuple[Array, Array]:
    """``C Ω`` and Ω for ``[x; 1]``, with the one itself as a last direction."""
    k = basis.shape[1]
    ones = jnp.pad(basis[-1], (0, probe.shape[1] - k))  # the last row of Ω
    upper = image + outer(total[:, None], ones[:, None])
    lower = total @ probe + count * ones
    full = jnp.concatenate([upper, lower[None]])
    full = jnp.concatenate([full, jnp.append(total, count)[:, None]], axis=1)
    own = jnp.concatenate([probe, ones[None]])
    unit = jnp.zeros((len(own), 1), own.dtype).at[-1].set(1)
    return full, jnp.concatenate([own, unit], axis=1)


def _of_sketch(basis: Array, image: Array, probe: Array) -> tuple[Array, Array, Array]:
    values, vectors = nystrom(image, probe)
    root = vectors * jnp.sqrt(values)[None, :]
    inside = cross(basis, root)
    rest = root - times(basis, inside)
    rest = rest - times(basis, cross(basis, rest))
    vectors, lengths, _ = svd(rest)
    return lengths**2, vectors, jnp.sum(inside**2)
