import optax
from jaxtyping import ArrayLike

from .. import subspaces as sub
from .._arguments import checks_trees
from ..linalg import nonzero
from ..transforms import normalize_rows, orthogonalize_updates
from ._common import DecayMask, chosen, elsewhere, finish, scale_by_rms
from ._neurons import outputs_as_rows


@checks_trees
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    scale: ArrayLike = 0.2,
    fallback: optax.GradientTransformation | None = None,
    weight_decay: ArrayLike = 0.01,
    mask: DecayMask = None,
    where: sub.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """NorMuon: Muon with a learning rate of its own for each output.

    ``M ← momentum · M + G``, ``N`` its polar factor after :func:`lrjax.normalize_rows`,
    and ``U = scale · N √(mn) / ‖N‖_F``, so that entries of ``U`` have the root mean square
    ``scale``, about that of Adam's updates. The rows are the outputs, as in Equinox, but
    for leaves called ``kernel``, which Flax stores ``(inputs, outputs)``, and the right
    factor of a :class:`lrjax.LowRank`; other layouts are told by ``where``, whose
    :class:`~lrjax.subspaces.MatrixSpec` names the rows.

    Departure from the paper: the polar factor is exact to rounding.

    Args:
        learning_rate: a number or a schedule.
        momentum: its decay.
        b2: decay of the mean squares of the rows of the polar factor.
        eps: added to their roots.
        scale: root mean square of an update.
        fallback: transform of the leaves that are not chosen; Adam by default.
        weight_decay: decoupled weight decay.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            matrices to treat.

    Returns:
        An optax optimizer.

    Raises:
        ValueError: as :func:`lrjax.normalize_rows`.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.normuon(0.5)
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
        Z. Li, L. Liu, C. Liang, W. Chen, T. Zhao, "NorMuon: making Muon more efficient
        and scalable" (2025), arXiv 2510.05491. Special case: with ``b2=0`` all outputs
        move by the same length.
    """
    where = outputs_as_rows(where)
    tx = optax.chain(
        chosen(optax.trace(momentum), where),
        orthogonalize_updates(where=where),
        normalize_rows(b2, eps, where=where),
        scale_by_rms(lambda size: scale / nonzero(size), where),
        elsewhere(fallback, where),
    )
    return finish(tx, learning_rate, weight_decay, mask)
