import optax
from jaxtyping import Array, ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from ..transforms import scale_by_kl_shampoo
from ._common import DecayMask, chosen, elsewhere, finish


@checks_trees
def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.98,
    eps: ArrayLike = 1e-8,
    refresh_every: int | Array = 10,
    max_side: int | None = None,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.01,
    mask: DecayMask = None,
    where: sub.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo: momentum over the root of a covariance with two Kronecker factors.

    ``U = (L ⊗ R)^(−½) M`` with ``M ← b1 M + (1−b1) G`` and ``L``, ``R`` as fitted by
    :func:`lrjax.scale_by_kl_shampoo`. It needs neither Adam's second moment, as
    :func:`lrjax.soap` does, nor step sizes grafted from it. For a matrix ``(m, n)`` the
    state is ``m n + 2 m² + 2 n²`` numbers. The first step only sets the bases.

    Departures from the official code: the eigenvalues start as the root mean square of
    the first gradient, not as 0.1, and are bounded relative to their largest, so that
    updates do not depend on the size of the gradients; bases are ordered at a refresh.
    Leaves that are no matrices get ``fallback``.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the momentum, whose bias is not corrected.
        b2: decay of the factors and of their eigenvalues.
        eps: added to the root, in units of the gradient.
        refresh_every: steps between two refreshes of a leaf; leaves take turns.
        max_side: sides longer than this are not rotated; None stands for 10,000.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.scale_by_kl_shampoo`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.kl_shampoo(0.3)
        >>> params = {"weight": jnp.zeros((8, 16))}
        >>> loss = lambda p: jnp.mean((p["weight"] - 1) ** 2)
        >>> step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     updates, state = step(params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> print(loss(params) < 0.5)
        True

    Reference:
        W. Lin, S. C. Lowe, F. Dangel, R. Eschenhagen, Z. Xu, R. B. Grosse, "Understanding
        and Improving Shampoo and SOAP via Kullback-Leibler Minimization" (2025), arXiv
        2509.03378. Special case: gradients ``A G Bᵀ`` with orthogonal ``A``, ``B`` give
        the updates ``A U Bᵀ``.
    """
    direction = scale_by_kl_shampoo(
        b2,
        eps,
        numerator=chosen(optax.ema(b1, debias=False), where),
        refresh_every=refresh_every,
        max_side=10000 if max_side is None else max_side,
        where=where,
    )
    tx = optax.chain(direction, elsewhere(fallback, where))
    return finish(tx, learning_rate, weight_decay, mask)
