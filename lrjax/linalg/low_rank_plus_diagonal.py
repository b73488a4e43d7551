from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree

from .tall import tall_apply, tall_inner, tall_mix, tall_svd


class _Symmetric(lx.AbstractLinearOperator):
    """What a symmetric operator on the vectors of a ``basis`` is, but for ``mv``."""

    basis: eqx.AbstractVar[PyTree[Float[Array, "..."]]]

    def as_matrix(self) -> Float[Array, "n n"]:
        """The dense matrix, on the raveled vectors."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.in_structure())
        flat, unravel = ravel_pytree(zeros)
        column = lambda x: ravel_pytree(self.mv(unravel(x)))[0]
        return jax.vmap(column)(jnp.eye(flat.size, dtype=flat.dtype))

    def transpose(self):
        """Itself."""
        return self

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the vectors."""
        struct = lambda x: jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)
        return jax.tree.map(struct, self.basis)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Those of the vectors."""
        return self.in_structure()


class LowRankPlusDiagonal(_Symmetric):
    """``U diag(λ) Uᵀ + diag(d)``, positive definite, as an operator of lineax.

    It acts on vectors or on any tree of arrays, such as parameters: ``U`` is then a tree of
    the same structure, whose leaves have one more axis of length ``r``. Never formed;
    a product takes ``O(n r)``. Solve with :class:`Woodbury`, or multiply by
    :meth:`inverse`, such as for a preconditioner.

    Attributes:
        basis: ``U``, ``(n, r)``, or a tree of arrays ``(*shape, r)``.
        values: ``λ (r,)``, not negative.
        diagonal: ``d``, positive: like the vectors, or one number for ``d I``.
        orthonormal: that ``UᵀU = I``, up to columns whose ``λ`` is zero. With one number
            ``d`` an inverse then takes no factorization.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, lrjax
        >>> basis, values = jnp.array([[1.0], [1.0], [0.0]]), jnp.array([2.0])
        >>> a = lrjax.linalg.LowRankPlusDiagonal(basis, values, jnp.array([1.0, 1.0, 4.0]))
        >>> print(a.as_matrix()[0])
        [3. 2. 0.]
        >>> b = jnp.array([5.0, 5.0, 4.0])
        >>> print(lx.linear_solve(a, b, lrjax.linalg.Woodbury()).value.round(4))
        [1. 1. 1.]
    """

    basis: PyTree[Float[Array, "..."]]
    values: Float[Array, " r"]
    diagonal: PyTree[Float[Array, "..."]]
    orthonormal: bool = eqx.field(static=True)

    def __init__(
        self,
        basis: PyTree[Float[Array, "..."]],
        values: Float[Array, " r"],
        diagonal: PyTree[ArrayLike],
        *,
        orthonormal: bool = False,
    ):
        """Fill the fields.

        Raises:
            ValueError: for a basis of another rank than ``values``, a diagonal of other
                shapes than the basis, negative values, or a diagonal that is not positive.
        """
        self.basis = basis
        self.values = values
        as_values = lambda x: jnp.asarray(x, values.dtype)
        self.diagonal = jax.tree.map(as_values, diagonal)
        self.orthonormal = orthonormal
        _check(basis, self.values, self.diagonal)

    def mv(self, vector: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        """``U (λ (Uᵀ x)) + d x``."""
        x, treedef = jax.tree.flatten(vector)
        basis = treedef.flatten_up_to(self.basis)
        low_rank = tall_apply(basis, self.values * tall_inner(basis, x))
        d = _for_leaves(self.diagonal, treedef)
        out = [u + t * y for u, t, y in zip(low_rank, d, x, strict=True)]
        return treedef.unflatten(out)

    def inverse(self) -> "InverseLowRankPlusDiagonal":
        """The inverse, factorized once: ``O(n r²)``, and ``O(n r)`` for each product.

        The usual form of Woodbury's formula solves with ``I + λ^(½) Uᵀ d⁻¹ U λ^(½)``, which
        squares the condition of the columns: in float32 nearly parallel ones lose their
        digits. Here ``d^(−½) U λ^(½) = V σ Fᵀ``, and what lies in the span of V and what
        does not are scaled apart::

            A⁻¹ = d^(−½) (V (I + σ²)⁻¹ Vᵀ + (I − V Vᵀ)) d^(−½)
        """
        root = jax.tree.map(jnp.sqrt, self.diagonal)
        if self.orthonormal and _is_number(root):
            return InverseLowRankPlusDiagonal(self.basis, self.values / root**2, root)
        basis, treedef = jax.tree.flatten(self.basis)
        roots = _for_leaves(root, treedef)
        weights = jnp.diag(jnp.sqrt(self.values))
        rows = lambda t: t if t.ndim == 0 else t[..., None]
        scaled = [x / rows(t) for x, t in zip(basis, roots, strict=True)]
        left, values, _ = tall_svd(tall_mix(scaled, weights))
        return InverseLowRankPlusDiagonal(treedef.unflatten(left), values**2, root)


class InverseLowRankPlusDiagonal(_Symmetric):
    """The inverse of a :class:`LowRankPlusDiagonal`, made by its method ``inverse``.

    Attributes:
        basis: ``V``, orthonormal, like the basis of the operator.
        excess: ``σ² (k,)``.
        root: ``d^(½)``, like the vectors or one number.
    """

    basis: PyTree[Float[Array, "..."]]
    excess: Float[Array, " k"]
    root: PyTree[Float[Array, "..."]]

    def mv(self, vector: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        """``A⁻¹ x``."""
        x, treedef = jax.tree.flatten(vector)
        basis = treedef.flatten_up_to(self.basis)
        roots = _for_leaves(self.root, treedef)
        x = [y / t for y, t in zip(x, roots, strict=True)]
        inside = tall_inner(basis, x)
        off = tall_apply(basis, inside)
        within = tall_apply(basis, inside / (1 + self.excess))
        parts = zip(x, off, within, roots, strict=True)
        return treedef.unflatten([(y - o + w) / t for y, o, w, t in parts])


class Woodbury(lx.AbstractLinearSolver):
    """A solver of lineax for :class:`LowRankPlusDiagonal`, by the formula of Woodbury.

    ``lx.linear_solve(operator, vector, Woodbury())`` costs ``O(n r²)``, and has the
    derivatives that lineax gives to every solution.

    Example:
        >>> import jax, jax.numpy as jnp, lineax as lx, lrjax
        >>> def first(ridge):
        ...     a = lrjax.linalg.LowRankPlusDiagonal(jnp.ones((2, 1)), jnp.ones(1), ridge)
        ...     return lx.linear_solve(a, jnp.ones(2), lrjax.linalg.Woodbury()).value[0]
        >>> print(jax.grad(first)(2.0))  # of 1 / (2 + ridge)
        -0.0625
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        """The inverse.

        Raises:
            TypeError: for an operator of another class.
        """
        del options
        if not isinstance(operator, LowRankPlusDiagonal):
            raise TypeError(
                f"Woodbury solves with a LowRankPlusDiagonal, got {type(operator)}: take "
                "lx.AutoLinearSolver(well_posed=True), or lx.CG, for other operators."
            )
        return operator.inverse()

    def compute(self, state, vector, options):
        """The solution."""
        del options
        return state.mv(vector), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        """The state as it is."""
        return state, options

    def conj(self, state, options):
        """The state as it is."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Yes: the operator is positive definite."""
        return True


def _is_number(tree: PyTree) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(0) and jnp.ndim(tree) == 0


def _for_leaves(tree: PyTree, treedef: Any) -> list[Array]:
    """The leaves of a tree of that structure, or one number for each of them."""
    if _is_number(tree):
        return [tree] * treedef.num_leaves
    return treedef.flatten_up_to(tree)


def _check(basis: PyTree, values: Array, diagonal: PyTree) -> None:
    shapes = jax.tree.map(jnp.shape, basis)
    if {shape[-1:] for shape in map(jnp.shape, jax.tree.leaves(basis))} != {values.shape}:
        raise ValueError(
            "LowRankPlusDiagonal needs a basis whose last axis is as long as its values, "
            f"got {values.size} values and a basis of shape {shapes}."
        )
    want = jax.tree.map(lambda x: x.shape[:-1], basis)
    if not _is_number(diagonal) and jax.tree.map(jnp.shape, diagonal) != want:
        raise ValueError(
            "LowRankPlusDiagonal needs a diagonal that is one number or has the shape of "
            f"the vectors, {want}, got {jax.tree.map(jnp.shape, diagonal)}."
        )
    concrete = lambda x: not isinstance(x, Tracer)
    # NumPy, because jax.numpy would trace the comparison inside a jitted function.
    if concrete(values) and (np.asarray(values) < 0).any():
        raise ValueError(f"LowRankPlusDiagonal needs values >= 0, got {values}.")
    for x in filter(concrete, jax.tree.leaves(diagonal)):
        if (np.asarray(x) <= 0).any():
            raise ValueError(
                f"LowRankPlusDiagonal needs a diagonal > 0, got one down to {x.min()}: add "
                "a damping to it."
            )


# What lineax asks about an operator.
for ask in (lx.is_symmetric, lx.is_positive_semidefinite):
    ask.register(_Symmetric)(lambda operator: True)
for ask in (
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.is_negative_semidefinite,
    lx.has_unit_diagonal,
):
    ask.register(_Symmetric)(lambda operator: False)
for same in (lx.linearise, lx.conj):
    same.register(_Symmetric)(lambda operator: operator)


@lx.materialise.register(_Symmetric)
def _(operator):
    function = lx.FunctionLinearOperator(
        operator.mv, operator.in_structure(), lx.positive_semidefinite_tag
    )
    return lx.materialise(function)


@lx.diagonal.register(_Symmetric)
def _(operator):
    return jnp.diagonal(operator.as_matrix())
