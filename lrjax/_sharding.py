import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


_BATCH = "UVWXYZ"  # labels that stand for the axes of an ellipsis


def _is_explicit(x: Array) -> bool:
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _spell_out(subscript: str, batch_ndim: int) -> str:
    """Name the axes of an ellipsis, aligned to the right: ``...mr`` -> ``YZmr``."""
    return subscript.replace("...", _BATCH[len(_BATCH) - batch_ndim :])


def _out_sharding(subscripts: str, operands: tuple[Array, ...]) -> NamedSharding | None:
    """Every axis of the result keeps the mesh axes that it has in the operands."""
    explicit = [x for x in operands if _is_explicit(x)]
    if not explicit:
        return None
    inputs, output = subscripts.split("->")
    mesh_axes: dict[str, tuple[str, ...]] = {}
    batch_ndim = 0
    for subscript, x in zip(inputs.split(","), operands, strict=True):
        ndim = x.ndim - len(subscript.replace("...", ""))
        batch_ndim = max(batch_ndim, ndim)
        spec = jax.typeof(x).sharding.spec
        for label, axis in zip(_spell_out(subscript, ndim), spec, strict=False):
            if axis is not None:
                mesh_axes[label] = axis if isinstance(axis, tuple) else (axis,)
    spec, used = [], set()
    for label in _spell_out(output, batch_ndim):
        axes = mesh_axes.get(label, ())
        # A mesh axis can shard one axis of an array only: the first one keeps it.
        spec.append(axes if axes and not used & set(axes) else None)
        used |= set(axes)
    mesh = jax.typeof(explicit[0]).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*spec))


def einsum(subscripts: str, *operands: Array) -> Array:
    """``jnp.einsum`` at full precision that also works on Explicit meshes.

    On an Explicit mesh JAX refuses to contract a sharded axis unless it is told where
    the result goes. Low-rank algebra always wants the same answer: the axes that
    survive keep their sharding, the contracted ones are summed over the devices.

    Args:
        subscripts: as for ``jnp.einsum``, with ``->``; an ellipsis stands for batch
            axes and aligns to the right.
        *operands: arrays.

    Returns:
        The contraction, computed at ``Precision.HIGHEST``.
    """
    return jnp.einsum(
        subscripts,
        *operands,
        precision=lax.Precision.HIGHEST,
        out_sharding=_out_sharding(subscripts, operands),
    )


def matvec(matrix: Array, vector: Array) -> Array:
    """``matrix @ vector``, fast also for a batch of vectors under ``vmap``.

    The members of the batch stay the last axis of the result in memory: with them first,
    where ``einsum`` moves them, the product takes twice the time on CPU. The barrier
    keeps XLA from folding the transposition that follows into the product.
    """
    product = lax.dot_general(
        matrix,
        vector,
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        out_sharding=_out_sharding("ks,s->k", (matrix, vector)),
    )
    return lax.optimization_barrier(product)


def gathered(x: Array) -> Array:
    """Matrices ``(*b, m, n)`` whole on every device, for what cannot run on a part.

    On an Explicit mesh JAX refuses to decompose a sharded matrix. Batch axes keep their
    sharding. Elsewhere a no-op: on Auto meshes the compiler gathers by itself.
    """
    if not _is_explicit(x):
        return x
    spec = jax.typeof(x).sharding.spec
    return _reshard(x, PartitionSpec(*spec[:-2], None, None))


def placed_like(x: Array, like: Array) -> Array:
    """``x`` in the sharding of an array of the same shape, on an Explicit mesh."""
    if not _is_explicit(like) and not _is_explicit(x):
        return x
    return _reshard(x, jax.typeof(like).sharding.spec)


def placed_along(x: Array, like: Array, axes: tuple[int | None, ...]) -> Array:
    """``x`` with its axis ``k`` sharded as axis ``axes[k]`` of ``like``, or not at all."""
    if not _is_explicit(like):
        return x
    spec = jax.typeof(like).sharding.spec
    return _reshard(x, PartitionSpec(*(None if a is None else spec[a] for a in axes)))


def _reshard(x: Array, spec: PartitionSpec) -> Array:
    mesh = jax.typeof(x).sharding.mesh
    same = not mesh.empty and jax.typeof(x).sharding.spec == spec
    return x if same else jax.sharding.reshard(x, spec)
