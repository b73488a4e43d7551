import contextlib

import equinox as eqx
import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .state_specs import state_specs


def on_mesh(
    tx: optax.GradientTransformation, specs: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Run a transform on an Auto mesh as it runs on an Explicit one.

    On an Auto mesh the compiler alone decides what devices send each other, and from the
    places of a sharded state it decides badly: it moves gradients to the moments. Within
    ``init`` and ``update`` all arrays are here on the same mesh with Explicit axes, where
    the transform says where each of them lies; what comes out is on the Auto mesh again.
    The state is placed by that, as :func:`lrjax.state_specs` says, and a step keeps it:
    ``jax.jit`` needs no ``out_shardings``.

    Args:
        tx: any optax transform.
        specs: a tree like the parameters, or a prefix of it, of ``NamedSharding``:
            ``jax.tree.map(lambda x: x.sharding, params)``.

    Returns:
        The transform. Further arguments of ``update`` that are trees like the parameters
        lie as they do; other arrays are replicated.

    Raises:
        ValueError: if the specs are not on one mesh, or its axes are not all Auto.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        >>> rows = {"weight": NamedSharding(mesh, P("data", None))}
        >>> params = jax.device_put({"weight": jnp.zeros((16, 32))}, rows)
        >>> state = lrjax.on_mesh(lrjax.subspace_adam(1e-3, rank=4), rows).init(params)
        >>> state[0].inner.mu["weight"].sharding.mesh == mesh
        True

    Reference:
        ``jax.sharding.explicit_axes``. Special case: what devices send each other is what
        they send on an Explicit mesh.
    """
    inner = optax.with_extra_args_support(tx)
    mesh = _auto_mesh(specs)
    explicit = Mesh(
        mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * mesh.devices.ndim
    )
    everywhere = NamedSharding(mesh, PartitionSpec())

    def enter(tree: PyTree, specs: PyTree) -> PyTree:
        def place(on: NamedSharding, part: PyTree) -> PyTree:
            there = NamedSharding(explicit, on.spec)
            moved = lambda x: jax.sharding.reshard(x, there) if eqx.is_array(x) else x
            return jax.tree.map(moved, part)

        return jax.tree.map(place, specs, tree)

    def leave(tree: PyTree) -> PyTree:
        # The compiler is told by the last operation inside where each array lies.
        return jax.sharding.reshard(tree, everywhere)

    def init(params):
        with _context_of(explicit):
            state = inner.init(enter(params, specs))
        return leave(state)

    def update(updates, state, params=None, **extra):
        like = jax.tree.structure(updates)
        own = lambda x: specs if jax.tree.structure(x) == like else everywhere
        places = state_specs(inner, updates, specs)
        with _context_of(explicit):
            params = None if params is None else enter(params, specs)
            extra = {name: enter(x, own(x)) for name, x in extra.items()}
            moved = enter(updates, specs), enter(state, places), params
            out = inner.update(*moved, **extra)
        return leave(out)

    return optax.GradientTransformationExtraArgs(init, update)


def _auto_mesh(specs: PyTree) -> Mesh:
    """The one mesh of the specs, all of whose axes are Auto."""
    given = jax.tree.leaves(specs)
    meshes = {s.mesh for s in given if isinstance(s, NamedSharding)}
    if len(meshes) != 1 or not all(isinstance(s, NamedSharding) for s in given):
        kinds = ", ".join(sorted({type(s).__name__ for s in given})) or "none"
        raise ValueError(
            "on_mesh takes NamedShardings of one mesh, in a tree like the parameters or a "
            f"prefix of it; got {kinds} on {len(meshes)} meshes."
        )
    (mesh,) = meshes
    if {*mesh.axis_types} != {AxisType.Auto} or not isinstance(mesh, Mesh):
        raise ValueError(
            f"on_mesh is for a mesh of devices whose axes are all Auto, got {mesh}: on an "
            "Explicit one a transform needs no wrapper."
        )
    return mesh


def _context_of(mesh: Mesh) -> contextlib.AbstractContextManager:
    """The mesh in the place of the one that ``jax.set_mesh`` has set, if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
