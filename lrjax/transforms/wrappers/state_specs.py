from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def state_specs(tx: optax.GradientTransformation, params: PyTree, specs: PyTree) -> PyTree:
    """The sharding of every array of an optimizer's state, from those of the parameters.

    Nothing is computed: ``tx.init`` is traced on an abstract mesh of explicit axes, on
    which JAX itself derives where each array lies, so that no device holds all of it.
    Arrays in the shape of a parameter follow it. Bases and Gram matrices are cut along
    all mesh axes that cut the matrix; moments in a subspace keep those of the axis that it
    leaves and take over those of the axis that it projects. Stacked layers stay with their
    layer; a stack that is sharded within its layers is spread by layer where that is
    cheaper than to add up its projections. Numbers are replicated.

    On an Auto mesh, pass the answer as ``jax.jit(tx.init, out_shardings=…)`` and as
    ``in_shardings`` and ``out_shardings`` of the step. On an Explicit mesh ``tx.init``
    places the state by itself and a step keeps it; the answer is then useful to restore
    a checkpoint.

    Args:
        tx: any optax transform.
        params: the parameters, or their ``jax.ShapeDtypeStruct``.
        specs: a tree like ``params``, or a prefix of it, of ``PartitionSpec``, for the
            mesh that ``jax.set_mesh`` has set, or of ``NamedSharding``.

    Returns:
        A tree like ``tx.init(params)``, of ``PartitionSpec`` or ``NamedSharding`` as
        ``specs`` is.

    Raises:
        ValueError: for specs without a mesh, or on more than one.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> from jax.sharding import PartitionSpec as P
        >>> params = {"weight": jnp.zeros((16, 32))}
        >>> tx = lrjax.subspace_adam(1e-3, rank=4)
        >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        ...     specs = lrjax.state_specs(tx, params, {"weight": P("data", None)})
        >>> print(specs[0].basis["weight"], specs[0].inner.mu["weight"])
        P('data', None) P(None, 'data')
    """
    mesh = _common_mesh(specs)
    named = isinstance(mesh, Mesh)
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.shape)
    )

    def place(spec, part):
        spec = spec.spec if isinstance(spec, NamedSharding) else spec
        on = NamedSharding(explicit, PartitionSpec() if spec is None else spec)
        placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)
        return jax.tree.map(placed, part)

    shapes = jax.eval_shape(lambda p: p, params)
    placed = jax.tree.map(place, specs, shapes, is_leaf=_is_spec)
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, placed)

    def answer(x):
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec
        return NamedSharding(mesh, spec) if named else spec

    return jax.tree.map(answer, state)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | NamedSharding)


def _common_mesh(specs: PyTree) -> Mesh | AbstractMesh:
    """The mesh of the given shardings, or the one that is set."""
    given = [s for s in jax.tree.leaves(specs, is_leaf=_is_spec) if s is not None]
    meshes = {s.mesh for s in given if isinstance(s, NamedSharding)}
    if len(meshes) > 1 or (meshes and any(isinstance(s, PartitionSpec) for s in given)):
        raise ValueError(
            "state_specs needs all specs alike: PartitionSpecs, or NamedShardings of one "
            f"mesh; got {len(given)} specs on {len(meshes)} meshes."
        )
    mesh = meshes.pop() if meshes else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            "state_specs does not know the mesh of these PartitionSpecs: call it within "
            "`with jax.set_mesh(mesh):`, or give NamedShardings."
        )
    return mesh
