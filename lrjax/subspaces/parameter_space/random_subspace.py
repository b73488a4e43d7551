"""All parameters of a model out of a few numbers: its random subspaces."""

import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._matrices import check_real
from ...linalg import Fastfood
from .affine_subspace import AffineSubspace, Columns


def _draw_dense(size: int, dim: int, dtype: Any, key: PRNGKeyArray) -> Columns:
    columns = jr.normal(key, (size, dim), dtype)
    return Columns(columns / jnp.linalg.norm(columns, axis=0, keepdims=True))


class _Sparse(NamedTuple):
    """In each column one number ``±1/√s`` in each of ``s ≈ √D`` stretches of rows."""

    places: Int[Array, "s dim"]
    signs: Float[Array, "s dim"]

    @classmethod
    def draw(cls, size: int, dim: int, dtype: Any, key: PRNGKeyArray) -> "_Sparse":
        k_place, k_sign = jr.split(key)
        s = math.isqrt(size - 1) + 1
        bounds = jnp.asarray([k * size // s for k in range(s + 1)], jnp.int32)[:, None]
        places = jr.randint(k_place, (s, dim), bounds[:-1], bounds[1:])
        return cls(places, jr.rademacher(k_sign, (s, dim), dtype))

    def __call__(self, x: Array, size: int) -> Array:
        values = self.signs * (x / len(self.places) ** 0.5)[None, :]
        return jnp.zeros(size, values.dtype).at[self.places].add(values)


def _draw_fastfood(size: int, dim: int, dtype: Any, key: PRNGKeyArray) -> Fastfood:
    return Fastfood.draw(max(size, dim), key=key, dtype=dtype)


_KINDS = {"dense": _draw_dense, "sparse": _Sparse.draw, "fastfood": _draw_fastfood}


def random_subspace(
    params: PyTree,
    dim: int,
    *,
    kind: Literal["fastfood", "dense", "sparse"] = "fastfood",
    key: PRNGKeyArray,
) -> AffineSubspace:
    """A function from a few numbers to all parameters of a model: ``x ↦ θ_0 + P x``.

    One ``x (dim,)`` moves all D parameters together, along ``P (D, dim)`` whose columns
    have norm one over the whole model. Train ``x`` from zero, by any optimizer: a gradient
    costs one product with ``Pᵀ`` more than that of the model.

    - ``"fastfood"``: by Hadamard transforms, ``O(D log D)`` time and ``3 D`` numbers
      whatever ``dim`` is; norms are one within about ``D^-½``.
    - ``"dense"``: normal numbers, ``D · dim`` of them.
    - ``"sparse"``: ``±s^-½`` at one place in each of ``s = ⌈√D⌉`` stretches of rows:
      ``√D · dim`` numbers, and places.

    Fewer dimensions are a mask: ``subspace(jnp.where(jnp.arange(dim) < d, x, 0))``, with a
    d that may be traced, so that a sweep over d is one ``vmap`` of one program. The
    intrinsic dimension of a task is the smallest d at which 90 % of the score of free
    training is reached.

    Args:
        params: the start θ_0: a model or any tree. What is no floating-point array in it
            stays as it is.
        dim: how many numbers, at most D.
        kind: of the projection.
        key: which one.

    Returns:
        A :class:`AffineSubspace`.

    Raises:
        TypeError: if ``key`` is none, or for complex parameters.
        ValueError: for another kind, ``dim`` out of range, or a tree without
            floating-point arrays.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> params = {"w": jnp.zeros((30, 20)), "b": jnp.zeros(30)}
        >>> subspace = lrjax.random_subspace(params, 10, key=jax.random.key(0))
        >>> loss = lambda x: jnp.mean((subspace(x)["w"] - 0.01) ** 2)
        >>> tx, x = optax.sgd(30.0), jnp.zeros(10)
        >>> state, first = tx.init(x), loss(x)
        >>> for _ in range(20):
        ...     updates, state = tx.update(jax.grad(loss)(x), state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < first)
        True

    Reference:
        C. Li, H. Farkhoor, R. Liu, J. Yosinski, "Measuring the intrinsic dimension of
        objective landscapes" (2018), arXiv 1804.08838; sparse columns: P. Li, T. J. Hastie,
        K. W. Church, "Very sparse random projections" (2006), KDD.
    """
    check_key("random_subspace", key)
    check_real("random_subspace", params)
    leaves = jax.tree.leaves(eqx.filter(params, eqx.is_inexact_array))
    size = sum(leaf.size for leaf in leaves)
    if not size:
        raise ValueError("random_subspace found no floating-point array in the parameters.")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {list(_KINDS)}, got {kind!r}.")
    if not 1 <= dim <= size:
        raise ValueError(f"dim must be between 1 and the {size} parameters, got {dim}.")
    dtype = jnp.result_type(jnp.float32, *leaves)
    return AffineSubspace(params, _KINDS[kind](size, dim, dtype, key), dim)
