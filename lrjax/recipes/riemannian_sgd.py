import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import riemannian


@checks_trees
def riemannian_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian gradient descent with momentum on matrices of a fixed rank.

    With the tangent projection ``P_W`` at a node ``W = U S Vᵀ`` of width ``r``::

        Z ← momentum · Z + P_W(G)        W⁺ ← SVD_r(W − η Z)        Z ← P_{W⁺}(Z)

    In factors throughout, see :func:`lrjax.riemannian`.

    Args:
        learning_rate: a number or a schedule.
        momentum: of all leaves; zero for none.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without an SVDForm node it is
        gradient descent with momentum.

    Raises:
        ValueError: as :func:`lrjax.riemannian`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 0.0, 0.0]))
        >>> loss = lambda x: jnp.sum((x.materialize() - target) ** 2) / 2
        >>> x = lrjax.svd(lrjax.LowRank(jnp.eye(4)[:, 1:3] + 1, jnp.eye(4)[:, :2]))
        >>> tx = lrjax.riemannian_sgd(0.3, momentum=0.5)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state = tx.init(x)
        >>> for _ in range(30):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < 1e-3)
        True

    Reference:
        B. Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013),
        arXiv 1209.3834. Special case: without momentum, :func:`lrjax.dlrt` in parallel with
        plain steps at full width.
    """
    plain = optax.chain(optax.trace(momentum), optax.scale_by_learning_rate(learning_rate))
    return riemannian(plain)
