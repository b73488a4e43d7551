import jax.tree_util as jtu
import optax

from ...transforms.subspace.project_updates import Where


def elsewhere(
    others: optax.GradientTransformation | None, where: Where
) -> optax.GradientTransformationExtraArgs:
    """The transform of the leaves that ``where`` does not choose; Adam by default."""

    def rest(tree):
        skip = lambda path, x: not where(jtu.keystr(path), x.shape)
        return jtu.tree_map_with_path(skip, tree)

    return optax.masked(optax.scale_by_adam() if others is None else others, rest)
