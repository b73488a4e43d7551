"""Each sample as a combination of the others."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._sharding import gathered
from ..linalg import nonzero, outer, rounding, svd, times
from ._active_set import Lassos, floor_of, minimize
from ._samples import as_samples, check_whole, in_their_span, share_of_largest


MOST = 256  # the default limit of a support: gram matrices of n · 256² numbers


class SelfExpression(eqx.Module):
    """What :func:`sparse_self_expression` returns.

    Attributes:
        coefficients: ``(n, n)``; sample j is about ``coefficients[j] @ samples``. The
            diagonal is zero.
        residual: ``(n,)``, by how much the optimality conditions of each sample fail, as
            a share of the weight of its l1 norm; with ``affine`` at least ``|Σc − 1|``.
            Infinite where a sample was left in the middle of a step.
        fit_weight: ``(n,)``, the γ of each sample.
        converged: whether all residuals are within the tolerance.
        steps: the steps taken.
    """

    coefficients: Float[Array, "n n"]
    residual: Float[Array, " n"]
    fit_weight: Float[Array, " n"]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]


def sparse_self_expression(
    samples: Float[ArrayLike, "n d"],
    *,
    fit_weight: ArrayLike = 50.0,
    relative: bool = True,
    l1_ratio: ArrayLike = 1.0,
    affine: bool = False,
    max_support: int | None = None,
    tol: ArrayLike = 1e-6,
    max_steps: int = 1000,
) -> SelfExpression:
    """Sparse subspace clustering's coefficients: each sample by few of the others.

    For every row ``x_j`` of the samples ``X (n, d)`` the minimum over ``c (n,)`` of::

        τ ‖c‖_1 + (1 − τ)/2 ‖c‖² + γ_j/2 ‖x_j − cᵀX‖²,    c_j = 0,  with affine Σ c = 1

    Samples of a union of subspaces are expressed by samples of their own subspace; the
    graph of :func:`affinity` then falls apart into the subspaces.

    By active sets: exact minimization on a support, which loses what changes its sign and
    wins what has the steepest slope. All samples advance at once, so that a step is two
    products with X and n small Cholesky factorizations. There are about twice as many
    steps as a support has atoms. The objective never rises, and the end is a minimum to
    rounding, not to the accuracy of an iteration.

    Affine subspaces, planes that miss the origin, are linear ones of one more dimension:
    where their dimensions, plus one each, add up to less than d, the constraint changes
    nothing that matters. In few dimensions it is needed.

    Args:
        samples: ``(n, d)``, one in a row. Longer rows have longer coefficients and no
            other support, so nothing needs to be normalized. With ``affine`` the mean is
            subtracted, which changes nothing but rounding and the default of γ.
        fit_weight: γ; ``relative`` to ``τ / max_{i≠j} |x_i·x_j|``, the largest at which
            nothing is used. A number or ``(n,)``; may be a tracer.
        relative: if False, ``fit_weight`` is γ itself.
        l1_ratio: τ, in (0, 1]. At one it is the lasso; below, the elastic net, which
            connects more of the samples of a subspace.
        affine: whether coefficients add up to one.
        max_support: at most as many samples in a combination, a static number that
            memory grows with, ``n max_support²``. By default 256, or all others.
        tol: residual at which a sample is done, but never less than rounding allows.
        max_steps: at most as many steps.

    Returns:
        A :class:`SelfExpression`, in float32 or wider. Not differentiated through. A
        sample that is zero, or has no product with another, gets zeros; with ``affine``
        its neighbors.

    Raises:
        ValueError: for samples that are no matrix of at least two rows, ``l1_ratio``
            outside (0, 1], or a ``max_support`` that is no number of others.
        TypeError: for complex samples.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])  # two lines
        >>> found = lrjax.clustering.sparse_self_expression(x)
        >>> print((abs(found.coefficients) > 0.1).astype(int), found.converged)
        [[0 1 0 0]
         [1 0 0 0]
         [0 0 0 1]
         [0 0 1 0]] True

    Reference:
        E. Elhamifar, R. Vidal, "Sparse subspace clustering: algorithm, theory, and
        applications" (2013), arXiv 1203.1005; C. You, C.-G. Li, D. P. Robinson, R. Vidal,
        "Oracle based active set algorithm for scalable elastic net subspace clustering"
        (2016), arXiv 1605.02633; of the constraint: C. You, C.-G. Li, D. P. Robinson,
        R. Vidal, "Is an affine constraint needed for affine subspace clustering?" (2019),
        ICCV. Special case: scikit-learn's ``Lasso(1 / (γ d), fit_intercept=False)`` of
        one sample on the others.
    """
    name = "sparse_self_expression"
    x = as_samples(name, samples)
    n = len(x)
    if max_support is None:
        max_support = min(n - 1, MOST)
    check_whole(name, "max_support", max_support, n - 1)
    check_whole(name, "max_steps", max_steps)
    if isinstance(l1_ratio, int | float) and not 0 < l1_ratio <= 1:
        raise ValueError(
            f"{name} needs l1_ratio in (0, 1], got {l1_ratio}: without an l1 norm it is "
            "lrjax.clustering.ridge_self_expression."
        )
    if isinstance(fit_weight, int | float) and not fit_weight > 0:
        raise ValueError(f"{name} needs a positive fit_weight, got {fit_weight}.")
    if affine:
        x = x - jnp.mean(x, axis=0, keepdims=True)
    x = in_their_span(gathered(x))
    # In units of the largest sample; no square overflows.
    size = nonzero(jnp.max(jnp.abs(x)))
    x = x / size
    products = outer(x, x)
    off = products - jnp.diag(jnp.diagonal(products))
    largest = jnp.max(jnp.abs(off), axis=1)
    tau = jnp.asarray(l1_ratio, x.dtype)
    gamma = jnp.broadcast_to(jnp.asarray(fit_weight, x.dtype), (n,))
    # Who has no product with others has no γ of its own either; any will do.
    unit = tau / jnp.where(largest > 0, largest, jnp.max(jnp.diagonal(products)))
    gamma = gamma * unit if relative else gamma * size**2
    weight = tau / gamma
    floor = floor_of(x, weight)
    tol = jnp.maximum(jnp.asarray(tol, x.dtype), floor)
    lassos = Lassos(x, products, weight, (1 - tau) / gamma, tol)
    coefficients, residual, steps = minimize(
        lassos, affine=affine, support=max_support, max_steps=jnp.asarray(max_steps)
    )
    return SelfExpression(
        coefficients, residual, gamma / size**2, jnp.all(residual <= tol), steps
    )


def low_rank_self_expression(
    samples: Float[ArrayLike, "n d"],
    *,
    fit_weight: ArrayLike = 50.0,
    relative: bool = True,
) -> Float[Array, "n n"]:
    """Low-rank subspace clustering's coefficients, in closed form.

    The minimum over ``C (n, n)`` of ``‖C‖_* + τ/2 ‖X − C X‖_F²``: with ``X = U diag(σ) Vᵀ``
    it is ``U diag(max(0, 1 − 1 / (τ σ²))) Uᵀ``. What is below ``σ² = 1/τ`` counts as noise.
    At ``τ = ∞`` it is ``U Uᵀ`` over all σ above rounding, the shape interaction matrix,
    which is that of low-rank representation without noise: zero between samples of
    independent subspaces.

    Args:
        samples: X, ``(n, d)``, one in a row.
        fit_weight: τ; ``relative`` to ``1/σ₁²``, so that what is below ``σ₁ / √50`` is
            noise by default. ``jnp.inf`` for clean samples.
        relative: if False, ``fit_weight`` is τ itself.

    Returns:
        ``(n, n)``, symmetric, in float32 or wider. Not differentiated through.

    Raises:
        ValueError: for samples that are no matrix of at least two rows.
        TypeError: for complex samples.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
        >>> clean = lrjax.clustering.low_rank_self_expression(x, fit_weight=jnp.inf)
        >>> print(clean.round(2) + 0.0)
        [[0.36 0.48 0.  ]
         [0.48 0.64 0.  ]
         [0.   0.   1.  ]]

    Reference:
        P. Favaro, R. Vidal, A. Ravichandran, "A closed form solution to robust subspace
        estimation and clustering" (2011), CVPR; G. Liu, Z. Lin, S. Yan, J. Sun, Y. Yu,
        Y. Ma, "Robust recovery of subspace structures by low-rank representation" (2013),
        arXiv 1010.2955. Special case: proximal gradient descent.
    """
    x = in_their_span(as_samples("low_rank_self_expression", samples))
    left, values, _ = svd(x)
    level = share_of_largest(values, fit_weight, relative)
    there = values > rounding(x.dtype, max(x.shape)) * values[0]
    kept = jnp.where(there, values, 1) ** 2
    shrunk = jnp.where(there, jnp.maximum(0, 1 - level / kept), 0)
    return outer(left * shrunk[None, :], left)


def ridge_self_expression(
    samples: Float[ArrayLike, "n d"],
    *,
    fit_weight: ArrayLike = 50.0,
    relative: bool = True,
    zero_diagonal: bool = True,
) -> Float[Array, "n n"]:
    """Least-squares regression's coefficients, in closed form.

    The minimum over each row ``c`` of ``‖c‖² + γ ‖x_j − cᵀX‖²``, with ``zero_diagonal`` at
    ``c_j = 0``. With ``D = (X Xᵀ + I/γ)⁻¹`` it is ``−D_ji / D_jj`` off the diagonal, and
    without the constraint ``X Xᵀ D``. By the SVD of X, on its shorter side.

    Args:
        samples: X, ``(n, d)``, one in a row.
        fit_weight: γ; ``relative`` to ``1/σ₁²``.
        relative: if False, ``fit_weight`` is γ itself.
        zero_diagonal: whether no sample may express itself.

    Returns:
        ``(n, n)`` in float32 or wider. Not differentiated through.

    Raises:
        ValueError: for samples that are no matrix of at least two rows.
        TypeError: for complex samples.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> lrjax.clustering.ridge_self_expression(x).round(2).tolist()
        [[0.0, 0.49, 0.0], [1.82, 0.0, 0.0], [0.0, 0.0, 0.0]]

    Reference:
        C.-Y. Lu, H. Min, Z.-Q. Zhao, L. Zhu, D.-S. Huang, S. Yan, "Robust and efficient
        subspace segmentation via least squares regression" (2012), arXiv 1404.6736.
        Special case: the normal equations.
    """
    x = in_their_span(as_samples("ridge_self_expression", samples))
    left, values, _ = svd(x)
    level = share_of_largest(values, fit_weight, relative)
    share = (level / (values**2 + level))[None, :]
    if not zero_diagonal:
        return outer(left * (1 - share), left)
    # γ-free: D/γ is one across the span, and a share of it along.
    beyond = jnp.maximum(0, 1 - jnp.sum(left**2, axis=1))
    itself = nonzero(beyond + jnp.sum(left**2 * share, axis=1))
    toward = times(left * (1 - share), left.T) / itself[:, None]
    return toward - jnp.diag(jnp.diagonal(toward))


def affinity(
    coefficients: Float[ArrayLike, "n n"], *, keep: int | None = None
) -> Float[Array, "n n"]:
    """The graph of a self-expression: how much two samples use each other.

    ``A = |R| + |R|ᵀ`` with R the ``keep`` largest coefficients of each row, and the rows
    divided by their l2 norms.

    Args:
        coefficients: ``(n, n)``, a row for each sample.
        keep: how many of a row are kept, with those that are tied; by default all.

    Returns:
        ``(n, n)``, symmetric, not negative, with a zero diagonal.

    Raises:
        ValueError: if the coefficients are not square, or ``keep`` is no number of them.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> c = jnp.array([[0.0, 3.0, 4.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> print(lrjax.clustering.affinity(c, keep=1))
        [[0. 1. 1.]
         [1. 0. 0.]
         [1. 0. 0.]]

    Reference:
        C. You, D. P. Robinson, R. Vidal, "Scalable sparse subspace clustering by
        orthogonal matching pursuit" (2016), arXiv 1507.01238.
    """
    sizes = jnp.abs(jnp.asarray(coefficients))
    n = len(sizes)
    if sizes.shape != (n, n):
        raise ValueError(f"affinity takes coefficients (n, n), got shape {sizes.shape}.")
    sizes = sizes - jnp.diag(jnp.diagonal(sizes))
    if keep is not None:
        check_whole("affinity", "keep", keep, n)
        least = jnp.sort(sizes, axis=1)[:, n - keep][:, None]
        sizes = jnp.where(sizes >= least, sizes, 0)
    sizes = sizes / nonzero(jnp.max(sizes, axis=1, keepdims=True))
    sizes = sizes / nonzero(jnp.sqrt(jnp.sum(sizes**2, axis=1, keepdims=True)))
    return sizes + sizes.T
