import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree


_BATCH = "UVWXYZ"  # labels that stand for the axes of an ellipsis


def _is_explicit(x: ArrayLike | jax.ShapeDtypeStruct) -> bool:
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a ``PartitionSpec``."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _axes_of(x: Array | jax.ShapeDtypeStruct) -> list[tuple[str, ...]]:
    """The mesh axes along which each axis of an array is sharded."""
    return [_names(entry) for entry in jax.typeof(x).sharding.spec]


def shards_of(x: Array) -> list[int]:
    """In how many pieces an Explicit mesh cuts each axis of an array."""
    if not _is_explicit(x):
        return [1] * x.ndim
    mesh = jax.typeof(x).sharding.mesh
    return [math.prod(mesh.shape[name] for name in axes) for axes in _axes_of(x)]


def _divides(x: Array, size: int, axes: tuple[str, ...]) -> bool:
    """Whether an axis of this size can be cut along these axes of the mesh of ``x``."""
    mesh = jax.typeof(x).sharding.mesh
    return size % math.prod(mesh.shape[name] for name in axes) == 0


def _spell_out(subscript: str, batch_ndim: int) -> str:
    """Name the axes of an ellipsis, aligned to the right: ``...mr`` -> ``YZmr``."""
    return subscript.replace("...", _BATCH[len(_BATCH) - batch_ndim :])


class _Placed(NamedTuple):
    """Where the axes of an ``einsum`` lie, and where what is summed over is scattered.

    Attributes:
        inputs: the subscript of each operand, spelled out.
        output: that of the result.
        axes: the mesh axes of each label, before the sums are scattered.
        scattered: the mesh axes of the contracted labels that move onto one of the result.
        mesh: the mesh.
    """

    inputs: list[str]
    output: str
    axes: dict[str, tuple[str, ...]]
    scattered: tuple[str, ...]
    mesh: AbstractMesh

    def sharding(self, onto: str = "") -> NamedSharding:
        """That of the result, with the scattered axes moved."""
        more = lambda label: self.scattered if label == onto else ()
        axes = [self.axes[label] + more(label) for label in self.output]
        return NamedSharding(self.mesh, _as_spec(axes))


def _place(
    subscripts: str, operands: tuple[Array, ...], first: str = "", onto: str = ""
) -> _Placed | None:
    """Every axis of the result keeps the mesh axes that it has in the operands.

    A mesh axis can shard one axis of an array only: ``first``, or else the first one,
    keeps it. Those of contracted axes move ``onto`` an axis of the result, if it divides.
    """
    explicit = [x for x in operands if _is_explicit(x)]
    if not explicit:
        return None
    inputs, output = subscripts.split("->")
    mesh_axes: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    batch_ndim = 0
    spelled = []
    for subscript, x in zip(inputs.split(","), operands, strict=True):
        ndim = x.ndim - len(subscript.replace("...", ""))
        batch_ndim = max(batch_ndim, ndim)
        labels = _spell_out(subscript, ndim)
        spelled.append(labels)
        for label, size, axes in zip(labels, x.shape, _axes_of(x), strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
            if axes:
                mesh_axes[label] = axes
    result = _spell_out(output, batch_ndim)
    kept: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for label in first + result.replace(first, "") + "".join(mesh_axes):
        if label not in kept:
            kept[label] = tuple(n for n in mesh_axes.get(label, ()) if n not in used)
            used |= {*kept[label]}
    scattered: tuple[str, ...] = ()
    if onto:
        freed = tuple(n for label in kept if label not in result for n in kept[label])
        if _divides(explicit[0], sizes[onto], kept[onto] + freed):
            scattered = freed
    mesh = jax.typeof(explicit[0]).sharding.mesh
    return _Placed(spelled, result, kept, scattered, mesh)


def _out_sharding(
    subscripts: str, operands: tuple[Array, ...], first: str = ""
) -> NamedSharding | None:
    placed = _place(subscripts, operands, first)
    return None if placed is None else placed.sharding()


def _as_spec(axes: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(a if len(a) > 1 else (a[0] if a else None) for a in axes))


def einsum(
    subscripts: str,
    *operands: Array,
    precision: lax.PrecisionLike = lax.Precision.HIGHEST,
    first: str = "",
    onto: str = "",
) -> Array:
    """``jnp.einsum`` at full precision that also works on Explicit meshes.

    On an Explicit mesh JAX refuses to contract a sharded axis unless it is told where
    the result goes. Low-rank algebra always wants the same answer: the axes that
    survive keep their sharding, the contracted ones are summed over the devices.

    Args:
        subscripts: as for ``jnp.einsum``, with ``->``; an ellipsis stands for batch
            axes and aligns to the right.
        *operands: arrays.
        precision: of the products; None for the one in force, which is the platform's
            own unless ``jax.default_matmul_precision`` says another.
        first: the label of the axis of the result that keeps its sharding if two clash;
            the leftmost one by default.
        onto: the label of an axis of the result that the sums are scattered along, so
            that no device holds all of them.

    Returns:
        The contraction.
    """
    placed = _place(subscripts, operands, first, onto)
    if placed is not None and placed.scattered:
        return _scattered_einsum(subscripts, operands, placed, onto, precision)
    return jnp.einsum(
        subscripts,
        *operands,
        precision=precision,
        out_sharding=None if placed is None else placed.sharding(),
    )


def _scattered_einsum(
    subscripts: str,
    operands: tuple[Array, ...],
    placed: _Placed,
    onto: str,
    precision: lax.PrecisionLike,
) -> Array:
    """A contraction of which every device gets its part of the sums alone.

    Told of the sharding of the result, XLA would add up all of it on every device first:
    always on CPU, and elsewhere where both sides of a matrix are sharded.
    """
    one = lambda size, axes: () if size == 1 else axes
    lies = [
        [one(size, placed.axes.get(k, ())) for k, size in zip(labels, x.shape, strict=True)]
        for labels, x in zip(placed.inputs, operands, strict=True)
    ]
    scattered = placed.output.index(onto)

    def local(*parts: Array) -> Array:
        sums = jnp.einsum(subscripts, *parts, precision=precision)
        to = {"scatter_dimension": scattered, "tiled": True}
        return lax.psum_scatter(sums, placed.scattered, **to)

    types = zip(placed.mesh.axis_names, placed.mesh.axis_types, strict=True)
    spread = jax.shard_map(
        local,
        mesh=placed.mesh,
        in_specs=tuple(map(_as_spec, lies)),
        out_specs=placed.sharding(onto).spec,
        axis_names={name for name, kind in types if kind == AxisType.Explicit},
    )
    at = next(x for x in operands if _is_explicit(x))
    return spread(*(_reshard(x, at, on) for x, on in zip(operands, lies, strict=True)))


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
    """Matrices ``(*b, m, n)`` whole on one device, for what cannot run on a part.

    On an Explicit mesh JAX refuses to decompose a sharded matrix. A stack is spread over
    the devices by layer where that comes out even, anything else is gathered. Elsewhere
    a no-op: on Auto meshes the compiler gathers by itself.
    """
    if not _is_explicit(x):
        return x
    x = by_layer(by_layer(x))
    return _reshard(x, x, [*_axes_of(x)[:-2], (), ()])


def by_layer(x: Array, axis: int | None = None, width: int | None = None) -> Array:
    """A stack ``(*b, m, n)``, with an axis of its matrices whole and the stack cut instead.

    What the devices exchange is their own part of the stack, once. Where no axis of the
    stack comes out even, and off Explicit meshes, it stays as it is.

    Args:
        x: the stack.
        axis: -2 or -1; by default the shorter one, or the other one if that is whole. One
            at a time, since the compiler would gather all to move both.
        width: to how many rows or columns ``axis`` will be projected. With that few of
            them it is cheaper to exchange those, and the stack stays as it is.
    """
    if not _is_explicit(x):
        return x
    axes = _axes_of(x)
    if axis is None:
        short = -2 if x.shape[-2] <= x.shape[-1] else -1
        axis = short if axes[short] else -3 - short
    shards = shards_of(x)[axis]
    if shards == 1 or (width is not None and shards * width <= x.shape[axis]):
        return x
    for k in range(x.ndim - 2):
        if _divides(x, x.shape[k], axes[k] + axes[axis]):
            axes[k], axes[axis] = axes[k] + axes[axis], ()
            return _reshard(x, x, axes)
    return x


def by_compiler(f: Callable, *args: Any, out: NamedSharding | None) -> Any:
    """``f(*args)`` for operations that have no rule on Explicit meshes.

    Within ``f`` the compiler shards as it likes; the result comes out sharded as ``out``
    says. Off Explicit meshes, where ``out`` is None, it is a plain call.
    """
    return f(*args) if out is None else jax.sharding.auto_axes(f, out_sharding=out)(*args)


def placed_like(x: Array, like: Array | jax.ShapeDtypeStruct) -> Array:
    """``x`` in the sharding of an array of the same shape, on an Explicit mesh."""
    if not _is_explicit(like) and not _is_explicit(x):
        return x
    return _reshard(x, like, _axes_of(like))


def placed_along(x: Array, like: Array, axes: tuple[int | None, ...]) -> Array:
    """``x`` with its axis ``k`` sharded as axis ``axes[k]`` of ``like``, or not at all."""
    if not _is_explicit(like):
        return x
    return _reshard(x, like, _along(like, axes))


def placed_beside(x: Array, a: Array, axes: tuple[int | None, ...]) -> Array:
    """``x`` with its last axes sharded as these of ``a``, and the others as its first.

    None stands for an axis that stays whole. So does an axis of another length than that
    of ``a``: one of length one, along which ``x`` serves all, or one that ``a`` lacks.
    """
    if not _is_explicit(a):
        return x
    own = _axes_of(a)
    places = (*range(x.ndim - len(axes)), *axes)
    along = lambda n, k: () if k is None or n != a.shape[k] else own[k]
    return _reshard(x, a, list(map(along, x.shape, places)))


def sharding_along(
    like: Array, axes: tuple[int | None, ...] | None = None
) -> NamedSharding | None:
    """That of an array whose axis ``k`` is sharded as axis ``axes[k]`` of ``like``.

    By default as all axes of ``like``; None if it does not lie on an Explicit mesh.
    """
    if not _is_explicit(like):
        return None
    axes = tuple(range(like.ndim)) if axes is None else axes
    return NamedSharding(jax.typeof(like).sharding.mesh, _as_spec(_along(like, axes)))


def projected_along(a: Array, axis: int) -> NamedSharding | None:
    """That of a projection of ``a`` along one of its last two axes, which is short then.

    The mesh axes of that one move to the other one, if it divides.
    """
    if not _is_explicit(a):
        return None
    axes, other = _axes_of(a), -3 - axis
    freed, axes[axis] = axes[axis], ()
    if _divides(a, a.shape[other], axes[other] + freed):
        axes[other] += freed
    return NamedSharding(jax.typeof(a).sharding.mesh, _as_spec(axes))


def _along(like: Array, axes: tuple[int | None, ...]) -> list[tuple[str, ...]]:
    own = _axes_of(like)
    return [() if axis is None else own[axis] for axis in axes]


def _reshard(
    x: Array, like: Array | jax.ShapeDtypeStruct, axes: list[tuple[str, ...]]
) -> Array:
    """``x`` sharded along these mesh axes, on the mesh of ``x`` or else of ``like``."""
    at = like if jax.typeof(x).sharding.mesh.empty else x
    mesh, spec = jax.typeof(at).sharding.mesh, _as_spec(axes)
    if at is x and _as_spec(_axes_of(x)) == spec:
        return x
    if at is not x and isinstance(like, Tracer):
        # A constant knows of no devices, and jit drops arguments that are not used.
        x = lax.optimization_barrier((x, like))[0]
    elif not isinstance(at, Tracer):
        mesh = cast(NamedSharding, at.sharding).mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def placed_as_state(x: Array, a: Float[Array, "*b m n"]) -> Array:
    """An array of the state of matrices ``a``, so that no device holds all of it.

    The one rule of placing, where the mesh is Explicit. Batch axes follow those of the
    matrices. Of further matrices, the first axis that comes out even is cut along all
    mesh axes that cut ``a``; numbers and rows of numbers stay whole.
    """
    if not _is_explicit(a):
        return x
    *batch, rows, columns = _axes_of(a)
    same = lambda k: k < len(batch) and x.shape[k] == a.shape[k]
    axes = [batch[k] if same(k) else () for k in range(x.ndim)]
    for k in range(len(batch), x.ndim if x.ndim >= a.ndim else 0):
        if _divides(a, x.shape[k], rows + columns):
            axes[k] = rows + columns
            break
    return _reshard(x, a, axes)


def sharding_spec(x: ArrayLike) -> PartitionSpec | None:
    """How an array lies on an Explicit mesh; None elsewhere."""
    return jax.typeof(x).sharding.spec if _is_explicit(x) else None


def select(mask: Bool[Array, "*b"], new: PyTree, old: PyTree) -> PyTree:
    """``new`` where the mask of the leading axes is true, in the dtype of ``old``."""

    def pick(n, o):
        wide = mask.reshape(*mask.shape, *(1,) * (o.ndim - mask.ndim))
        wide = placed_like(jnp.broadcast_to(wide, o.shape), o)
        return jnp.where(wide, placed_like(n.astype(o.dtype), o), o)

    return jax.tree.map(pick, new, old)
