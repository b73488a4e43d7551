"""The tangent space of the tensors of given ranks."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ...linalg import cross, svd, times, working_dtype
from ..tangent import divided
from .form import TuckerForm, over_batch, unfold


def tucker_tangent(x: TuckerForm, gradient: TuckerForm) -> TuckerForm:
    """A gradient projected on the tangent space of the tensors of the ranks of ``x``.

    With the gradient ``G`` of the tensor, which is never formed, and ``C_(k) = P_k Σ_k
    Q_kᵀ`` the unfoldings of the core::

        G ×_1 U_1 U_1ᵀ … ×_d U_d U_dᵀ + Σ_k C_k ×_k N_k ×_{j≠k} U_j
        N_k = (I − U_k U_kᵀ) G_(k) (⊗_{j≠k} U_j) Q_k      C_k unfolds to Q_kᵀ

    from the gradient of the core and of the factors, ``G_(k) (⊗ U_j) C_(k)ᵀ``, which
    autodiff gives: ``P_k`` and ``Σ_k`` are divided out column by column, and what is
    rounding alone becomes zero. A step along it moves ``x`` as far as its ranks allow.

    Args:
        x: a form with orthonormal factors ``(*batch, n_k, w_k)``, no ``w_k`` larger than
            the product of the others; columns that are not in use count for nothing.
        gradient: of its core and its factors.

    Returns:
        The projection as a form with factors ``[U_k | N_k]``, of twice the widths, in
        float32 or wider. The columns of ``N_k`` that are not zero come first.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lrjax.lowrank import TuckerForm, tucker_tangent
        >>> eye = jnp.eye(2)[:, :1]
        >>> x = TuckerForm(jnp.ones((1, 1)), (eye, eye))
        >>> loss = lambda x: jnp.sum(x.materialize() * jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> print(tucker_tangent(x, jax.grad(loss)(x)).materialize())
        [[1. 2.]
         [3. 0.]]

    Reference:
        O. Koch, C. Lubich, "Dynamical tensor approximation" (2010), SIAM Journal on Matrix
        Analysis and Applications.
    """
    project = over_batch(_project, x.core.ndim - len(x.factors))
    return project(x, TuckerForm(gradient.core, gradient.factors))


def _project(x: TuckerForm, gradient: TuckerForm) -> TuckerForm:
    dtype = working_dtype(x.dtype)
    core = lax.stop_gradient(x.masked_core()).astype(dtype)
    inside = TuckerForm(gradient.core.astype(dtype), x.factors, x.active).masked_core()
    total = jnp.pad(inside, [(0, w) for w in x.widths])
    factors = []
    for axis, (u, slope) in enumerate(zip(x.factors, gradient.factors, strict=True)):
        u, slope = u.astype(dtype), slope.astype(dtype)
        rows = unfold(core, axis)
        p, _, qt = svd(rows)
        values = jnp.sum(p * times(rows, qt.T), axis=0)
        new = divided(slope, p, values)
        if x.active is not None:
            used = jnp.arange(u.shape[1])[None] < x.active[axis]
            u, new = jnp.where(used, u, 0), jnp.where(used, new, 0)
        new = new - times(u, cross(u, new))
        factors.append(lax.concatenate([u, new], 1))
        total = total + jnp.pad(_folded(qt, axis, x.widths), _beside(axis, x.widths))
    return TuckerForm(total, factors)


def _folded(rows: Array, axis: int, widths: tuple[int, ...]) -> Array:
    others = [w for k, w in enumerate(widths) if k != axis]
    return jnp.moveaxis(rows.reshape(-1, *others), 0, axis)


def _beside(axis: int, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """The new columns of one axis come after the old ones; the other axes have the old."""
    return [(w, 0) if k == axis else (0, w) for k, w in enumerate(widths)]
