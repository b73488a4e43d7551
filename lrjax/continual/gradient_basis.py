from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._arguments import check_parameters
from .._matrices import Where, check_real, path_name
from ..linalg import nonzero, rounding, svd, working_dtype
from . import _rows


class GradientBasis(eqx.Module):
    """Directions in the space of all parameters that later steps leave alone.

    ``g ← g − Vᵀ V g`` with orthonormal rows ``V (k, p)`` over all p numbers of the
    parameters. Where V spans the gradients ``∇f_c(x)`` of outputs at stored samples, these
    outputs stay what they are to first order in the step, and exactly in a model that is
    linear in its parameters. V is a tree like the parameters with a leading axis; it takes
    ``k p`` numbers, so ``k`` copies of the model.

    Use it behind an optimizer, ``optax.chain(optax.adam(1e-3), lrjax.project_out(basis))``:
    behind everything that rescales entries, moments or weight decay, which would lead out
    of the complement again. What it stores is up to what is added:

    - *Orthogonal gradient descent*: at the end of a task the gradients of the logit of the
      true class at some of its samples. Heads of single tasks are left out by ``where``.
    - *OGD+*: start anew at the end of each task, and add the gradients of the stored
      samples of all tasks at the parameters of now.
    - *PCA-OGD*: ``keep="largest"``; or, for some directions of each task, what
      ``GradientBasis.start(params, few, keep="largest").add(gradients).directions`` holds
      is added to the basis of all.

    Attributes:
        directions: ``V``, a tree like the parameters with a leading axis; zero rows are
            free. ``None`` where nothing is protected.
        sizes: the root of the energy that was seen along each direction ``(k,)``, zero of
            the free ones.
        offered: the energy ``Σ ‖g‖²`` of all gradients that were added.
        captured: how much of it V holds.
        keep: which directions are there once there is no more room.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax, optax
        >>> model = eqx.nn.MLP(2, 3, 8, 1, key=jax.random.key(0))
        >>> x, y = jax.random.normal(jax.random.key(1), (4, 2)), jnp.array([0, 2, 1, 0])
        >>> logit = lambda model, x, y: model(x)[y]
        >>> gradients = eqx.filter_vmap(eqx.filter_grad(logit), in_axes=(None, 0, 0))
        >>> params = eqx.filter(model, eqx.is_inexact_array)
        >>> basis = lrjax.continual.GradientBasis.start(params, columns=10)
        >>> basis = basis.add(gradients(model, x, y))
        >>> print(basis.used, round(float(basis.kept), 3))
        4 1.0
        >>> tx = optax.chain(optax.adam(1e-3), lrjax.project_out(basis))
        >>> state = tx.init(params)
        >>> step, _ = tx.update(params, state, params)
        >>> change = eqx.filter_jvp(jax.vmap(logit, (None, 0, 0)), (model, x, y),
        ...     (step, None, None))[1]
        >>> bool(jnp.max(jnp.abs(change)) < 1e-8)
        True

    Reference:
        M. Farajtabar, N. Azizan, A. Mott, A. Li, "Orthogonal gradient descent for
        continual learning" (2019), arXiv 1910.07104; M. Abbana Bennani, T. Doan, M.
        Sugiyama, "Generalisation guarantees for continual learning with orthogonal
        gradient descent" (2020), arXiv 2006.11942 (OGD+); T. Doan et al., "A theoretical
        analysis of catastrophic forgetting through the NTK overlap matrix" (2020), arXiv
        2010.04003 (PCA-OGD). Special case: the QR factorization of all gradients.
    """

    directions: PyTree
    sizes: Float[Array, " k"]
    offered: Float[Array, ""]
    captured: Float[Array, ""]
    keep: Literal["first", "largest"] = eqx.field(static=True)

    @staticmethod
    def start(
        params: PyTree,
        columns: int,
        *,
        keep: Literal["first", "largest"] = "first",
        where: Where | None = None,
    ) -> "GradientBasis":
        """An empty basis, which leaves every gradient as it is.

        Args:
            params: the parameters, ``eqx.filter(model, eqx.is_inexact_array)``.
            columns: k, for how many directions there is room.
            keep: ``"first"``, what comes when there is no more room is dropped; or
                ``"largest"``, the principal directions of all that was added so far (to
                what an incremental singular value decomposition of that width knows).
            where: which leaves are protected, from their path and shape; all by default.

        Raises:
            ValueError: without room, for another ``keep``, or if ``where`` picks nothing.
        """
        check_parameters("GradientBasis", params)
        check_real("GradientBasis", params)
        if not isinstance(columns, int) or columns < 1:
            raise ValueError(
                f"GradientBasis needs room for one direction or more, got {columns!r}."
            )
        if keep not in ("first", "largest"):
            raise ValueError(
                f"GradientBasis keeps the 'first' or the 'largest', got {keep!r}."
            )

        def room(path, x):
            if where is not None and not where(path_name(path), jnp.shape(x)):
                return None
            # Of the array itself, so that it lies on a mesh as that does.
            dtype = working_dtype(jnp.result_type(x))
            rows = jnp.zeros_like(x, dtype)[None]
            return jnp.concatenate([rows] * columns)

        directions = jtu.tree_map_with_path(room, params)
        leaves = jax.tree.leaves(directions)
        if not leaves:
            names = [path_name(p) for p, _ in jtu.tree_flatten_with_path(params)[0]]
            raise ValueError(
                "GradientBasis has nothing to protect: where= picked none of the leaves "
                f"{', '.join(names)}."
            )
        dtype = jnp.result_type(*leaves)
        zero = jnp.zeros((), dtype)
        return GradientBasis(directions, jnp.zeros(columns, dtype), zero, zero, keep)

    @property
    def used(self) -> Int[Array, ""]:
        """How many directions there are."""
        return jnp.sum(self.sizes > 0)

    @property
    def kept(self) -> Float[Array, ""]:
        """The share of the energy of all that was added that the basis holds.

        Below one, to rounding, there was no room for all of it.
        """
        full = self.offered > 0
        return jnp.where(full, self.captured / nonzero(self.offered), 1)

    def add(self, gradients: PyTree) -> "GradientBasis":
        """The basis that spans further gradients too, so far as there is room.

        One after the other, as Gram and Schmidt do, each off all before it twice: they stay
        orthonormal to rounding however many follow. What is a sum of the others to
        rounding takes no room. One with an infinite number, or none, in it is left out.

        Args:
            gradients: a tree like the parameters with a leading axis, over which they are
                counted.

        Raises:
            ValueError: for a tree of other paths or shapes.
        """
        new = [x.astype(y.dtype) for x, y in self._paired("gradients", gradients, 1)]
        old, structure = jax.tree.flatten(self.directions)
        scale = _rows.largest_entries(new)
        finite = jnp.isfinite(scale) & (scale > 0)
        scale = jnp.where(finite, scale, 0)
        clean = lambda x: jnp.where(finite.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
        new = _rows.scaled(1 / nonzero(scale), list(map(clean, new)))
        count, k = len(scale), len(self.sizes)
        if self.keep == "largest":  # with room for all of them at first
            old = [
                jnp.concatenate([x, jnp.zeros_like(y)])
                for x, y in zip(old, new, strict=True)
            ]
        (rows, _), (coefficients, energy) = lax.scan(_insert, (old, self.used), new)
        coefficients = scale[:, None] * coefficients
        offered = self.offered + jnp.sum(scale**2 * energy)
        if self.keep == "first":
            found = jnp.sum(coefficients**2, axis=0)
            sizes = jnp.sqrt(self.sizes**2 + found)
            captured = self.captured + jnp.sum(found)
        else:
            before = jnp.concatenate([jnp.diag(self.sizes), jnp.zeros((k, count))], axis=1)
            _, sizes, turn = svd(jnp.concatenate([before, coefficients]))
            there = sizes > rounding(sizes.dtype, k + count) * sizes[0]
            sizes = jnp.where(there, sizes, 0)[:k]
            turn = jnp.where(there[:, None], turn, 0)[:k]
            rows = _rows.nearly_orthonormal(_rows.combine(turn, rows))
            captured = jnp.sum(sizes**2)
        return GradientBasis(structure.unflatten(rows), sizes, offered, captured, self.keep)

    def project_out(self, updates: PyTree) -> PyTree:
        """``u − Vᵀ V u``; leaves that are not protected stay as they are.

        Raises:
            ValueError: if a protected leaf is missing, or has another shape.
        """
        pairs = self._paired("updates", updates, 0)
        rows = [x[None].astype(y.dtype) for x, y in pairs]
        rest = _rows.off(rows, jax.tree.leaves(self.directions))
        left = {p: x[0] for p, x in zip(self._paths(), rest, strict=True)}
        put = lambda path, u: left[path].astype(u.dtype) if path in left else u
        return jtu.tree_map_with_path(put, updates)

    def _paths(self) -> list[tuple]:
        return [path for path, _ in jtu.tree_flatten_with_path(self.directions)[0]]

    def _paired(self, name: str, tree: PyTree, axes: int) -> list[tuple[Array, Array]]:
        """The leaves of another tree, each with its directions."""
        leaves, pairs = dict(jtu.tree_flatten_with_path(tree)[0]), []
        for path, rows in jtu.tree_flatten_with_path(self.directions)[0]:
            x = leaves.get(path)
            if x is None or jnp.shape(x)[axes:] != rows.shape[1:]:
                got = "nothing" if x is None else f"{jnp.shape(x)}"
                want = ", ".join(["count"] * axes + [str(n) for n in rows.shape[1:]])
                raise ValueError(
                    f"GradientBasis protects {path_name(path) or 'the root'} and needs "
                    f"{name} of shape ({want}) there, got {got}. What is not trained is "
                    "left out of the basis by where=."
                )
            pairs.append((jnp.asarray(x), rows))
        return pairs


def _insert(carry: tuple, gradient: list[Array]) -> tuple:
    """One more direction, if there is room for it and it is new.

    Its coefficients in what there is then, and its energy.
    """
    basis, used = carry
    k = len(basis[0])
    coefficients, rest = _rows.outside([x[None] for x in gradient], basis)
    row = [x[None] for x in gradient]
    energy, left = _rows.inner(row, row)[0, 0], _rows.inner(rest, rest)[0, 0]
    noise = rounding(left.dtype, k) ** 2 * energy
    new = (left > noise) & (used < k)
    length = jnp.sqrt(jnp.where(new, left, 1))
    slot = jnp.minimum(used, k - 1)

    def put(rows, x):
        now = lax.dynamic_slice_in_dim(rows, slot, 1)
        there = jnp.where(new, x / length, now)
        return lax.dynamic_update_slice_in_dim(rows, there, slot, 0)

    basis = [put(rows, x) for rows, x in zip(basis, rest, strict=True)]
    here = (jnp.arange(k) == slot) & new
    found = coefficients[0] + jnp.where(here, length, 0)
    return (basis, used + new), (found, energy)
