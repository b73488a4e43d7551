"""What a fit of a tensor has found: its parts, and how far they can be trusted."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...linalg import nonzero, orthonormalize
from ...lowrank import TuckerForm, multiply_axes, unfolded_svd
from .._center import meet
from .._plots import plot_fit, refuse_batch
from .thresholded import Path, norm, relative_norm


TRUSTED = 0.1  # of the size of the low-rank part: the error held out that is trusted


class TensorFit(eqx.Module):
    """A tensor of low multilinear rank, and the gross errors beside it.

    Attributes:
        low_rank: a :class:`lrjax.lowrank.TuckerForm`, with the center; columns of its
            factors are orthonormal, and zero from the rank of their axis on, but for one
            that the center needs.
        center: the constant in it, which no rank counts.
        sparse: the gross errors, zero where nothing is observed; of a completion zeros.
        ranks: ``(d,)``, the ranks of the unfoldings.
        residual: ``‖tensor − low_rank − sparse‖ / ‖tensor‖`` over what is observed.
        held_out_error: the median error at entries held out, of the turn in which they
            were or of the last one, relative to the size of the low-rank part or of the
            data without what stands out, whichever is smaller.
        steps: iterations taken, in both turns.
        converged: whether the residual fell to the tolerance, or the thresholds to where
            the entries held out are predicted best.
        trusted: whether ``held_out_error`` is at most a tenth.
    """

    low_rank: TuckerForm
    center: Float[Array, ""]
    sparse: Float[Array, "*s"]
    ranks: Int[Array, " d"]
    residual: Float[Array, ""]
    held_out_error: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    trusted: Bool[Array, ""]

    def plot(self) -> Any:
        """Draw the singular values of all unfoldings, and all sizes that tell of errors.

        Without the center. Right: how many entries of the low-rank part and gross errors
        are how large, with a line at the error where entries were held out. A fit is good
        where it is far left of the low-rank part.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: for a batch of fits.
        """
        refuse_batch(self)
        # Of the core, as the factors are orthonormal.
        core, factors = self.low_rank.core, self.low_rank.factors
        values, _ = unfolded_svd(core - self.center * _constant(factors))
        named = {
            f"axis {axis}": (values[axis], self.ranks[..., axis])
            for axis in range(len(values))
        }
        entries = self.low_rank.materialize() - self.center
        size = jnp.sqrt(jnp.mean(entries**2))
        levels = {"error of entries held out": self.held_out_error * size}
        return plot_fit(self, named, entries, self.sparse, levels)


def assemble(
    path: Path,
    sparse: Array,
    rest: Array,
    tensor: Array,
    origin: Array,
    unit: Array,
    tol: Array,
    error: Array,
    steps: Array,
) -> TensorFit:
    """The fit, in units of the data and with their origin.

    Args:
        path: where the loop ended.
        sparse: the gross errors.
        rest: what no part explains.
        tensor: what is observed.
        origin: what was taken off the data,
        unit: and what they were divided by.
        tol: of the residual.
        error: at entries held out.
        steps: taken, in both turns.
    """
    residual = relative_norm(rest, tensor)
    # A low-rank part that exploded must not count as the measure of its error.
    size = jnp.minimum(norm(path.core) / tensor.size**0.5, 1)
    relative = error / nonzero(size)
    center = origin + unit * path.center
    return TensorFit(
        low_rank=_with_constant(path.core * unit, path.factors, path.ranks, center),
        center=center,
        sparse=sparse * unit,
        ranks=path.ranks,
        residual=residual,
        held_out_error=relative,
        steps=steps,
        converged=(path.residual <= tol) | (path.left <= 0),
        trusted=relative <= TRUSTED,
    )


def _with_constant(
    core: Array, factors: Sequence[Array], ranks: Array, center: Array
) -> TuckerForm:
    """A Tucker form and a constant as one: a column of each factor makes room for it."""
    wider = []
    for factor, rank in zip(factors, ranks, strict=True):
        n, width = factor.shape
        factor = jnp.pad(factor, ((0, 0), (0, min(width + 1, n) - width)))
        ones = jnp.ones(n, factor.dtype)
        new = orthonormalize(ones[:, None], against=factor)
        at = jnp.arange(factor.shape[1]) == rank
        factor = jnp.where(at[None, :], new, factor)
        wider.append(meet(ones, factor, jnp.sum(factor, axis=0)))
    padding = [(0, w.shape[1] - n) for w, n in zip(wider, core.shape, strict=True)]
    return TuckerForm(jnp.pad(core, padding) + center * _constant(wider), wider)


def _constant(factors: Sequence[Array]) -> Array:
    """The core of a tensor of ones, if it is in the span of the orthonormal factors."""
    one = jnp.ones((1,) * len(factors), factors[0].dtype)
    return multiply_axes(one, tuple(jnp.sum(f, axis=0)[:, None] for f in factors))
