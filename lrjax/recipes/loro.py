import optax
from jaxtyping import Array, ArrayLike

from .._arguments import checks_trees
from ..transforms import every, retract, scale_by_tangent
from ._common import on_nodes


@checks_trees
def loro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    exact_every: int | Array = 500,
    inner: optax.GradientTransformation | None = None,
    damping: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """LORO: training on the manifold of low-rank matrices, exactly every so often.

    With ``(A, B)`` the directions that ``inner`` makes of the gradients ``G right``,
    ``Gᵀ left`` of the factors, most steps are plain, ``left − η A``, ``right − η B``.
    Every ``exact_every``-th one moves the product ``X = left @ right.T`` of rank ``r``
    along the tangent space and back::

        X ← SVD_r(X − η (A K_r rightᵀ + left K_l Bᵀ − left K_l C K_r rightᵀ))
        K_l = (leftᵀ left)⁻¹    K_r = (rightᵀ right)⁻¹    C = ½ (leftᵀ A + Bᵀ right)

    which for the gradients themselves is the projection of ``G`` onto the tangent space.
    The factors are balanced afterwards. With ``inner=optax.identity()`` and
    ``exact_every=1`` this is Riemannian gradient descent with matrices of fixed rank.
    Everything costs ``O((m + n) r²)``; ``G`` is never formed.

    Args:
        learning_rate: a number or a schedule.
        exact_every: the period of the exact steps.
        inner: transform of the gradients of the factors, and of all other leaves; Adam by
            default.
        damping: of the two inverses, relative to the mean diagonal of what is inverted.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without a LowRank node it is
        ``inner`` with a learning rate.

    Raises:
        ValueError: for ``exact_every`` below one or a negative damping; as
            :func:`lrjax.retract`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.eye(6)[:, :4]
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2)
        >>> x = lrjax.LowRank(jnp.eye(6)[:, 1:3], jnp.ones((4, 2)))
        >>> tx = lrjax.loro(0.1, exact_every=5)
        >>> state, first = tx.init(x), loss(x)
        >>> for _ in range(20):
        ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < first / 2)
        True

    Reference:
        Z. Mo, L.-K. Huang, S. J. Pan, "Parameter and memory efficient pretraining via
        low-rank Riemannian optimization" (2025), ICLR. Special case: exact steps of the
        raw gradient are ``SVD_r(X − η P(G))`` with the tangent projection ``P``, whatever
        the factors.
    """
    return optax.chain(
        optax.scale_by_adam() if inner is None else inner,
        optax.scale_by_learning_rate(learning_rate),
        on_nodes(every(exact_every, optax.chain(scale_by_tangent(damping), retract()))),
    )
