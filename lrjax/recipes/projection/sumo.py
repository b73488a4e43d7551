import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import ArrayLike, PRNGKeyArray

from ... import subspaces as sub
from ...transforms import limit_norm_growth, orthogonalize_updates, project_updates
from ...transforms.subspace.project_updates import Where
from .._finish import finish


def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank = 0.25,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 1.0,
    decay: ArrayLike = 0.95,
    growth: ArrayLike = 1.01,
    others: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.0,
    where: Where = sub.is_hidden_matrix,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SUMO: momentum in a subspace, with all of its singular values set to one, exactly.

    ``M ← decay · M + Pᵀ G``, ``U = scale · P polar(M)``, the polar factor of the small
    ``(r, n)`` momentum by an exact SVD; ``P`` comes from a randomized SVD every
    ``refresh_every`` steps and the momentum moves along. The norm of a step grows by at
    most ``growth``.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``.
        refresh_every: the period of the basis.
        scale: factor of the update of projected leaves.
        decay: of the momentum.
        growth: the limit.
        others: transform of the leaves that are not projected; Adam by default.
        weight_decay: decoupled weight decay.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get ``others``.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> tx = lrjax.sumo(1e-2, rank=2)
        >>> state = tx.init({"weight": jnp.ones((8, 16))})

    Reference:
        "SUMO" (2025), arXiv 2505.24749. Special case: at full rank, the polar factor of
        plain momentum.
    """
    inner = optax.chain(
        optax.trace(decay),
        orthogonalize_updates("svd", where=lambda path, shape: True),
        limit_norm_growth(growth),
    )
    tx = project_updates(
        inner,
        sub.randomized_svd(rank),
        schedule=sub.every(refresh_every),
        carry=sub.rotate(),
        lift=sub.project(scale),
        where=where,
        key=key,
    )

    def chosen(tree):
        pick = lambda path, x: where(jtu.keystr(path), jnp.shape(x)) is not False
        return jtu.tree_map_with_path(pick, tree)

    def rest(tree):
        return jax.tree.map(lambda pick: not pick, chosen(tree))

    others = optax.scale_by_adam() if others is None else others
    tx = optax.chain(optax.masked(tx, chosen), optax.masked(others, rest))
    return finish(tx, learning_rate, weight_decay)
