import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from ..._matrices import check_real
from ...linalg import eigh, nonzero, outer, times
from .affine_subspace import AffineSubspace, Columns


def trajectory_subspace(
    snapshots: PyTree, dim: int, *, start: PyTree | None = None
) -> AffineSubspace:
    """The subspace in which a run has moved: all parameters out of a few numbers.

    ``x ↦ θ_0 + P x`` with the ``dim`` leading principal components ``P (D, dim)``,
    orthonormal, of the snapshots ``θ_1, …, θ_T`` of a run about their mean. They come from
    the inner products of the snapshots, ``(T, T)``: nothing of D × D is formed. Train ``x``
    from zero, by any optimizer; with so few numbers also a quasi-Newton method is cheap. Of
    a run whose snapshots span fewer directions than ``dim``, the last columns are zero.

    Args:
        snapshots: a tree like the parameters, with a leading axis of T on every array: what
            ``jax.lax.scan`` stacks, or ``jnp.stack`` over a list. What is no floating-point
            array in it is taken from ``start``.
        dim: how many numbers, fewer than there are snapshots.
        start: the parameters θ_0 at zero; the first snapshot by default.

    Returns:
        An :class:`AffineSubspace`.

    Raises:
        TypeError: for complex parameters.
        ValueError: for ``dim`` out of range, arrays with different leading axes, or a start
            that is no tree like a snapshot.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> time = jnp.linspace(0, 1, 5)
        >>> run = {"w": jnp.stack([3 * time, 4 * time], axis=1), "b": jnp.zeros(5)}
        >>> subspace = lrjax.trajectory_subspace(run, 1)
        >>> print(abs(subspace(jnp.array([5.0]))["w"]).round(4))
        [3. 4.]

    Reference:
        T. Li, L. Tan, Z. Huang, Q. Tao, Y. Liu, X. Huang, "Low dimensional trajectory
        hypothesis is true: DNNs can be trained in tiny subspaces" (2021), arXiv 2103.11154.
    """
    check_real("trajectory_subspace", snapshots)
    stacks = jax.tree.leaves(eqx.filter(snapshots, eqx.is_inexact_array))
    counts = {jnp.shape(x)[:1] for x in stacks}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            "trajectory_subspace needs snapshots stacked along a leading axis of one "
            f"length, got arrays of shapes {[jnp.shape(x) for x in stacks]}."
        )
    count = counts.pop()[0]
    if not 1 <= dim < count:
        raise ValueError(
            f"trajectory_subspace needs dim between 1 and {count - 1}, fewer than the "
            f"{count} snapshots; got {dim}."
        )
    first = lambda x: x[0] if eqx.is_inexact_array(x) else x
    like = jax.tree.map(first, snapshots)
    start = like if start is None else start
    shapes = lambda tree: [
        x.shape for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    ]
    if shapes(start) != shapes(like):
        raise ValueError(
            "trajectory_subspace needs a start with the arrays of one snapshot, of shapes "
            f"{shapes(like)}; got {shapes(start)}."
        )
    dtype = jnp.result_type(jnp.float32, *stacks)
    flat = [lax.stop_gradient(x).astype(dtype).reshape(count, -1) for x in stacks]
    flat = [x - jnp.mean(x, axis=0, keepdims=True) for x in flat]
    products = [outer(x, x) for x in flat]
    gram = sum(products[1:], products[0])
    values, vectors = eigh(gram)
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    # What rounding alone makes of a direction that the run never took is none.
    there = values > count * jnp.finfo(dtype).eps * values[0]
    root = jnp.where(there, lax.rsqrt(jnp.where(there, values, 1)), 0)
    columns = jnp.concatenate([times(x.T, vectors * root[None, :]) for x in flat])
    sizes = jnp.sqrt(jnp.sum(columns**2, axis=0, keepdims=True))
    return AffineSubspace(start, Columns(columns / nonzero(sizes)), dim)
