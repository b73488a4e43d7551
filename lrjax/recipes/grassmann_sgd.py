import optax
from jaxtyping import ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from .._matrices import DefaultRule
from ..transforms import follow_geodesics


@checks_trees
def grassmann_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
    where: sub.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian SGD for layers that represent classes by subspaces, SGD for the others.

    ``M ← momentum · M + G`` on every leaf, and ``W ← W − learning_rate · M``. Bases of
    subspaces ``S (n, k)`` follow the geodesic in that direction, by
    :func:`lrjax.follow_geodesics`: the momentum is that of all entries of ``S``, its part
    outside of the subspace taken at each step. Weight decay has no meaning for a subspace;
    on the others it comes first, as ``optax.add_decayed_weights`` within ``optax.masked``.

    Args:
        learning_rate: a number or a schedule.
        momentum: its decay.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            bases; by default all leaves called ``subspaces``, as in
            :class:`lrjax.nn.GrassmannHead`.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.follow_geodesics`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.grassmann_sgd(0.1)
        >>> nearly = jnp.eye(4)[:, :2].at[3, 0].set(0.1)
        >>> params = {"subspaces": nearly, "bias": jnp.ones(3)}
        >>> loss = lambda p: -jnp.sum(p["subspaces"][3] ** 2) + jnp.sum(p["bias"] ** 2)
        >>> state = tx.init(params)
        >>> for _ in range(60):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < -0.9)  # the last axis is in the subspace
        True

    Reference:
        H. Wang, Z. Li, W. Zhang, "Get the best of both worlds: improving accuracy and
        transferability by Grassmann class representation" (2023), arXiv 2308.01547.
        Special case: with one column it is momentum SGD on the sphere.
    """
    where = DefaultRule(_is_subspaces) if where is None else where
    return optax.chain(
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
        follow_geodesics(where=where),
    )


def _is_subspaces(path: str, shape: tuple[int, ...]) -> bool:
    return path.split(".")[-1] == "subspaces" and len(shape) >= 2
