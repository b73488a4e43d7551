from typing import Literal

import optax
from jaxtyping import Array, ArrayLike

from .._arguments import checks_trees
from ..transforms import dynamical_low_rank


@checks_trees
def dlrt(
    learning_rate: optax.ScalarOrSchedule,
    *,
    tol: ArrayLike = 0.1,
    method: Literal["parallel", "augmented", "kls"] = "parallel",
    every: int | Array | None = None,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DLRT: training in low rank, with bases that follow the gradient and ranks found.

    A node ``U S Vᵀ`` gets bases ``[U | G V]`` and ``[V | Gᵀ U]``, its small core one step
    of ``inner``, and is truncated to the smallest rank whose tail is at most ``tol`` of
    all: see :func:`lrjax.dynamical_low_rank`. The official codes apply the transpose of
    the right factor when they truncate; here it is the factor.

    On a :class:`lrjax.nn.TuckerConv`, whose kernel is a Tucker form, it is TDLRT: each axis
    has a basis and a rank.

    Args:
        learning_rate: a number or a schedule.
        tol: the relative tail that is cut; the larger, the smaller the ranks. 0.05 to 0.3
            in the paper.
        method: ``"parallel"`` with one gradient; ``"kls"``, the paper's, with a second one
            through ``update(..., value_and_grad_fn=f)``; ``"augmented"`` with core steps in
            wide bases.
        every: the period in which bases move, by default 1, and 10 for ``"augmented"``.
        inner: transform of the gradient of cores and of all other leaves; Adam by default.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Without an SVDForm node it is
        ``inner`` with a learning rate.

    Raises:
        ValueError: as :func:`lrjax.dynamical_low_rank`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> target = jnp.diag(jnp.array([3.0, 2.0, 0.0, 0.0]))
        >>> loss = lambda x: jnp.mean((x.materialize() - target) ** 2)
        >>> x = lrjax.svd(jnp.ones((4, 4)) + jnp.eye(4))
        >>> tx = lrjax.dlrt(0.05, tol=0.1)
        >>> step = jax.jit(lambda x, s: tx.update(jax.grad(loss)(x), s, x))
        >>> state, first = tx.init(x), loss(x)
        >>> for _ in range(60):
        ...     updates, state = step(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> print(loss(x) < first / 10)
        True

    Reference:
        S. Schotthöfer, E. Zangrando, J. Kusch, G. Ceruti, F. Tudisco, "Low-rank lottery
        tickets: finding efficient low-rank neural networks via matrix differential
        equations" (2022), arXiv 2205.13571; of convolutions: E. Zangrando et al.,
        "Geometry-aware training of factorized layers in tensor Tucker format" (2023),
        arXiv 2305.19059. Special case: with ``inner=optax.identity()``
        the parallel step is the truncation of ``W − η P(G)``, the tangent projection.
    """
    if every is None:
        every = 10 if method == "augmented" else 1
    plain = optax.chain(
        optax.scale_by_adam() if inner is None else inner,
        optax.scale_by_learning_rate(learning_rate),
    )
    return dynamical_low_rank(plain, tol, method=method, every=every)
