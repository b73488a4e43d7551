from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ..._sharding import einsum
from .._numerics import nonzero, working_dtype
from ..decompositions import eigh
from ..low_rank_plus_diagonal import LowRankPlusDiagonal
from ..tall import tall_gram, tall_mix, tall_svd


def nystrom(
    image: PyTree[Float[Array, "..."]], probe: PyTree[Float[Array, "..."]]
) -> tuple[Float[Array, " k"], PyTree[Float[Array, "..."]]]:
    """Eigenvalues and vectors of a positive semidefinite C from ``C Ω`` alone.

    ``C ≈ (C Ω)(Ωᵀ C Ω)⁺(C Ω)ᵀ``, the best guess below C that agrees with it on Ω; exact
    where the rank of C is at most k. The image is linear in C, so it can be summed over
    a stream of which nothing is kept.

    Where ``Ωᵀ C Ω`` has a negative eigenvalue, ``C + 2|λ_min| I`` is approximated and the
    shift taken off again, so that no direction in which C nearly vanishes is divided by.

    Args:
        image: ``C Ω``, ``(n, k)``, or a tree of arrays with one more axis of length k.
        probe: ``Ω`` with orthonormal columns, like the image.

    Returns:
        The eigenvalues ``(k,)``, falling and not negative, and orthonormal columns like
        the image. In float32 or wider.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> c = jnp.diag(jnp.array([4.0, 1.0, 0.0]))
        >>> probe = jnp.linalg.qr(jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))[0]
        >>> print(lrjax.linalg.nystrom(c @ probe, probe)[0].round(4))
        [4. 1.]

    Reference:
        J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher, "Fixed-rank approximation of a
        positive-semidefinite matrix from streaming data" (2017), arXiv:1706.05736.
    """
    leaves, treedef = jax.tree.flatten(image)
    wide = lambda x: lax.stop_gradient(x).astype(working_dtype(x.dtype))
    y, omega = map(wide, leaves), map(wide, treedef.flatten_up_to(probe))
    values, basis = _nystrom(list(y), list(omega))
    return values, treedef.unflatten(basis)


def nystrom_sketch(
    product: Callable[[PyTree], PyTree], like: PyTree, rank: int, *, key: PRNGKeyArray
) -> tuple[Float[Array, " r"], PyTree[Float[Array, "..."]]]:
    """The leading eigenvalues and vectors of an operator that is known by its products.

    :func:`nystrom` of ``r`` products with random orthonormal vectors. ``0 ⪯ U Λ Uᵀ ⪯ C``
    for a positive semidefinite C; an indefinite one is shifted.

    Args:
        product: ``x ↦ C x``, linear and symmetric, on trees like ``like``: the Hessian
            of a loss for instance, or the method ``mv`` of an operator of lineax.
        like: a tree of arrays, or of shapes and dtypes, as ``product`` takes it.
        rank: ``r``, how many products are taken.
        key: for the vectors.

    Returns:
        The eigenvalues ``Λ (r,)``, falling, and a tree ``U`` like ``like`` whose leaves
        have one more axis of length ``r``.

    Raises:
        ValueError: for a rank that is not between one and the size of ``like``.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> loss = lambda p: 4.5 * p["w"].sum() ** 2 + 0.5 * p["b"] ** 2
        >>> params = {"w": jnp.ones(4), "b": jnp.array(1.0)}
        >>> product = lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]
        >>> key = jax.random.key(0)
        >>> values, basis = lrjax.linalg.nystrom_sketch(product, params, 2, key=key)
        >>> print(values.round(3), basis["w"].shape)
        [36.  1.] (4, 2)

    Reference:
        Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nyström preconditioning" (2021),
        arXiv:2110.02820. Special case: exact if the rank of C is at most ``r``.
    """
    check_key("nystrom_sketch", key)
    leaves, treedef = jax.tree.flatten(like)
    size = sum(x.size for x in leaves)
    if not 1 <= rank <= size:
        raise ValueError(
            f"nystrom_sketch needs a rank between 1 and the {size} numbers of a vector, "
            f"got {rank}."
        )
    draw = lambda i, x: (
        jr.normal(jr.fold_in(key, i), (*x.shape, rank), working_dtype(x.dtype))
        + jnp.zeros_like(x, working_dtype(x.dtype))[..., None]
    )
    omega, _, _ = tall_svd([draw(i, x) for i, x in enumerate(leaves)])

    def image(columns: list[Array]) -> list[Array]:
        given = [c.astype(x.dtype) for c, x in zip(columns, leaves, strict=True)]
        found = treedef.flatten_up_to(product(treedef.unflatten(given)))
        return [y.astype(c.dtype) for y, c in zip(found, columns, strict=True)]

    values, basis = _nystrom(jax.vmap(image, -1, -1)(omega), omega)
    return values, treedef.unflatten(basis)


def nystrom_preconditioner(
    product: Callable[[PyTree], PyTree],
    like: PyTree,
    rank: int,
    *,
    damping: ArrayLike = 0.0,
    key: PRNGKeyArray,
) -> LowRankPlusDiagonal:
    """A preconditioner of ``C + μI`` for conjugate gradients, from ``r`` products with C.

    With the :func:`nystrom_sketch` ``U Λ Uᵀ`` of C it takes the leading eigenvalues down
    to the last one and leaves all others as they are::

        P = U (Λ + μI) Uᵀ / (λ_r + μ) + (I − U Uᵀ)

    Worth its ``r`` products where the spectrum falls: the condition number that is left is
    about ``(λ_r + μ)/(λ_min + μ)``.

    Args:
        product: ``x ↦ C x``, as for :func:`nystrom_sketch`; without ``μ``.
        like: a tree of arrays, or of shapes and dtypes.
        rank: ``r``.
        damping: ``μ``, zero or more.
        key: for the sketch.

    Returns:
        P, an operator of lineax. Conjugate gradients, such as those of
        ``jax.scipy.sparse.linalg``, take ``M=P.inverse().mv``.

    Raises:
        ValueError: as :func:`nystrom_sketch`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> from jax.scipy.sparse.linalg import cg
        >>> values, b = 1e4 ** -jnp.linspace(0.0, 1.0, 50), jnp.ones(50)
        >>> product = lambda x: values * x
        >>> key = jax.random.key(0)
        >>> p = lrjax.linalg.nystrom_preconditioner(product, b, 30, key=key)
        >>> plain, _ = cg(product, b, maxiter=30)
        >>> better, _ = cg(product, b, M=p.inverse().mv, maxiter=30)
        >>> error = lambda x: jnp.linalg.norm(values * x - b)
        >>> print(error(better) < 1e-2 * error(plain))
        True

    Reference:
        Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nyström preconditioning" (2021),
        arXiv:2110.02820. Special case: at full rank ``P = (C + μI)/(λ_n + μ)``.
    """
    check_key("nystrom_preconditioner", key)
    values, basis = nystrom_sketch(product, like, rank, key=key)
    last = jnp.maximum(values[-1], jnp.finfo(values.dtype).eps * values[0])
    ratio = (values - values[-1]) / nonzero(last + damping)
    return LowRankPlusDiagonal(basis, ratio, 1.0, orthonormal=True)


def _nystrom(image: list[Array], probe: list[Array]) -> tuple[Array, list[Array]]:
    eps = jnp.finfo(jnp.result_type(*image)).eps
    core = tall_gram(probe, image)
    values, vectors = eigh((core + core.T) / 2)
    # A shift of rounding size, taken off again, holds the core away from singular.
    rounding = eps * jnp.sqrt(sum(jnp.sum(y**2) for y in image))
    shift = jnp.maximum(rounding, -2 * values[0])
    shifted = [y + shift * x for y, x in zip(image, probe, strict=True)]
    values = values + shift
    floor = jnp.maximum(eps * values[-1], jnp.finfo(values.dtype).tiny)
    root = jnp.where(values > floor, lax.rsqrt(jnp.maximum(values, floor)), 0)
    basis, lengths, _ = tall_svd(tall_mix(shifted, einsum("rs,s->rs", vectors, root)))
    return jnp.maximum(lengths**2 - shift, 0), basis
