"""Small things that every dense algorithm here needs, each written once."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from .._sharding import einsum


SMALL = 128  # the longest side of a matrix for which a GPU has fast batched factorizations


def working_dtype(dtype) -> jnp.dtype:
    """The dtype in which decompositions of ``dtype`` arrays run: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def identity_like(g: Float[Array, "*b r r"]) -> Float[Array, "*b r r"]:
    """Identity matrices with the shape, dtype and sharding of a stack of matrices."""
    return jnp.zeros_like(g) + jnp.eye(g.shape[-1], dtype=g.dtype)[(None,) * (g.ndim - 2)]


def nonzero(size: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """A size to divide by: itself where it is positive, one where there is nothing."""
    return jnp.where(size > 0, size, 1)


def unit_columns(x: Float[Array, "*b n r"]) -> Float[Array, "*b n r"]:
    """Columns of length one, of any scale before; zero columns stay. A constant."""
    unit = x / nonzero(jnp.max(jnp.abs(x), axis=-2, keepdims=True))
    sizes = jnp.sqrt(jnp.sum(unit**2, axis=-2, keepdims=True))
    return lax.stop_gradient(unit / nonzero(sizes))


def together(
    f: Callable[..., Array], *columns: Sequence[Float[Array, "..."]]
) -> list[Array]:
    """``map(f, *columns)``, those that are alike as one batch.

    A small factorization takes an accelerator the time that starting it takes, and a
    compiler as long as a batch of them. Large ones, and those that no other is like in
    shape, type and sharding, are taken one by one.
    """
    rows = list(zip(*columns, strict=True))
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        small = max(row[0].shape[-2:]) <= SMALL
        groups.setdefault(tuple(map(jax.typeof, row)) if small else i, []).append(i)
    found: dict[int, Array] = {}
    for members in groups.values():
        if len(members) == 1:
            found[members[0]] = f(*rows[members[0]])
        else:
            batch = map(jnp.stack, zip(*(rows[i] for i in members), strict=True))
            found.update(zip(members, f(*batch), strict=True))
    return [found[i] for i in range(len(rows))]


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Refuse a rank that no matrix of a shape ``(*b, m, n)`` has."""
    most = min(shape[-2:])
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank must be between 1 and min(m, n) = {most} for a matrix of shape "
            f"{shape}, got {rank}."
        )


def increment(count: Int[Array, ""]) -> Int[Array, ""]:
    """A step count plus one, which stays at the largest integer once it is there."""
    return jnp.asarray(optax.safe_increment(count))


def times(
    x: Float[Array, "*#b m k"],
    y: Float[Array, "*#b k n"],
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
) -> Float[Array, "... m n"]:
    """``x y``, at full precision by default, on every kind of mesh."""
    return einsum("...mk,...kn->...mn", x, y, precision=precision)


def cross(
    x: Float[Array, "*#b n r"],
    y: Float[Array, "*#b n s"],
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
) -> Float[Array, "... r s"]:
    """``xᵀ y``, at full precision by default, on every kind of mesh."""
    return einsum("...nr,...ns->...rs", x, y, precision=precision)


def outer(
    x: Float[Array, "*#b m r"],
    y: Float[Array, "*#b n r"],
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
) -> Float[Array, "... m n"]:
    """``x yᵀ``, at full precision by default, on every kind of mesh."""
    return einsum("...mr,...nr->...mn", x, y, precision=precision)


_OF_BFLOAT16 = "BF16_BF16_F32"  # products with bfloat16 gradients: float32 sums


def _in_force() -> str | None:
    """The precision of products that ask for none, unless it is the platform's own."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore


def products_at(precision: str | None, dtype: Any) -> contextlib.AbstractContextManager:
    """A context for products with a gradient, which ask for no precision of their own.

    Args:
        precision: as ``jax.default_matmul_precision`` takes it. None leaves the one in
            force; where that is the platform's own, products with bfloat16 gradients
            multiply in bfloat16 and add in float32.
        dtype: of the gradient.
    """
    if precision is None and _in_force() is None and dtype == jnp.bfloat16:
        precision = _OF_BFLOAT16
    if precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)


def carrying_precision() -> lax.PrecisionLike:
    """Of products that carry float32 moments: the one in force, within ``products_at``.

    Full where that is the one of bfloat16 gradients, which moments outlive.
    """
    return lax.Precision.HIGHEST if _in_force() == _OF_BFLOAT16 else None


def rounding(dtype: Any, size: int) -> float:
    """The relative rounding error of a projection along an axis of this length.

    What is left of a vector of norm one after all of it was projected off is no longer.
    """
    return 8 * float(jnp.finfo(dtype).eps) * size**0.5


_FULL = ("highest", "float32", "F32_F32_F32", "F64_F64_F64")


def product_rounding(dtype: Any, size: int) -> Float[Array, ""]:
    """As :func:`rounding`, of products that are taken at the precision in force.

    On accelerators their operands may be rounded to the ten bits of TF32 or the seven of
    bfloat16. On CPU they never are.
    """
    adding = jnp.asarray(rounding(dtype, size), dtype)
    precision = _in_force()
    if precision in _FULL or dtype == jnp.float64:
        return adding
    ten_bits = lambda: jnp.maximum(adding, 4 * 2**-11)
    seven_bits = lambda: jnp.maximum(adding, 4 * 2**-8)
    if precision is not None and precision.startswith(_OF_BFLOAT16):
        return lax.platform_dependent(cpu=lambda: adding, default=seven_bits)
    return lax.platform_dependent(cpu=lambda: adding, tpu=seven_bits, default=ten_bits)
