import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .. import subspaces as sub
from .._arguments import checks_trees
from ..subspaces import project_updates
from ..transforms import quantize_state
from ._common import DecayMask, finish


@checks_trees
def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: sub.Rank | None = None,
    *,
    refresh_every: int | Array = 200,
    scale: ArrayLike = 0.25,
    threshold: ArrayLike = 0.4,
    block: int | None = None,
    min_size: int | None = None,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
    where: sub.Where | None = None,
    precision: str | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Q-GaLore: GaLore with a 4-bit basis, 8-bit moments and fewer and fewer SVDs.

    The basis is stored at four bits a number (:class:`lrjax.subspaces.Quantized`), the
    moments at eight (:func:`lrjax.quantize_state`), both with one scale for each ``block``
    numbers. After each SVD of a leaf ``|⟨p₁_new, p₁_old⟩|`` is noted; when the last five
    average at least ``threshold``, the leaf's period doubles. Parameters of eight bits are
    the affair of whoever applies the updates.

    Args:
        learning_rate: a number or a schedule.
        rank: columns of the basis; an int, a fraction of the short side, or a callable of
            ``(path, (rows, columns))``; None stands for a quarter of the short side.
        refresh_every: the first period of the basis.
        scale: factor of the update of projected leaves.
        threshold: the mean overlap from which a period doubles.
        block: numbers that share a scale; None stands for 256.
        min_size: smaller moments stay in full precision; None stands for 4096.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: which leaves to project; see :func:`lrjax.project_updates`. The others
            get plain Adam.
        precision: of the products with the gradient; see :func:`lrjax.project_updates`.
        key: source of the random numbers.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.project_updates`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.q_galore(0.3, rank=2)
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
        Z. Zhang et al., "Q-GaLore: quantized GaLore with INT4 projection and
        layer-adaptive low-rank gradients" (2024), arXiv 2407.08296.
    """
    min_size = 4096 if min_size is None else min_size
    block = 256 if block is None else block
    rank = 0.25 if rank is None else rank
    tx = project_updates(
        optax.scale_by_adam(b1, b2, eps),
        sub.Quantized(sub.SVD(rank), bits=4, group=block),  # pyright: ignore[reportCallIssue]
        schedule=sub.Adaptive(refresh_every, threshold=threshold),
        lift=sub.Project(scale),
        where=where,
        precision=precision,
        key=key,
    )
    tx = quantize_state(tx, block=block, min_size=min_size)
    return finish(tx, learning_rate, weight_decay, mask)
