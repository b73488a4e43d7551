import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int

from ...._arguments import checks_trees
from ...._tree import check_has_nodes, check_params, like, map_nodes
from ....linalg import increment, nonzero
from ....lowrank import LowRank
from ..._checks import check_extra, check_non_negative
from ._precondition import Order, Phi, PhiState, Whitened, in_turn, precondition


class ScaleByGramState(NamedTuple):
    """The state of :func:`scale_by_gram`, where its rule depends on one.

    Attributes:
        count: the number of updates made.
        phi: what a ``phi`` with a state remembers, for all factors together; for those
            of the left, those of the right and those whose partner is frozen apart if
            the order is alternating.
    """

    count: Int[Array, ""]
    phi: tuple[PhiState, ...] = ()


@checks_trees
def scale_by_gram(
    damping: ArrayLike | optax.Schedule = 0.0,
    *,
    relative: bool = True,
    order: Order = "jacobi",
    phi: Phi | optax.GradientTransformation | None = None,
    loss_power: ArrayLike | None = None,
    f_min: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Precondition the gradient of each factor by the Gram matrix of the other one.

    For a node ``X = left @ right.T`` with gradients ``G_l (m, r)`` and ``G_r (n, r)``::

        P_l = G_l (rightᵀright + λI)⁻¹        P_r = G_r (leftᵀleft + λI)⁻¹

    With ``λ = 0`` the step ``X ← X − η(P_l rightᵀ + left P_rᵀ)`` does not depend on how X
    is split into factors, and the local rate of convergence does not depend on the
    condition number of X. It is block-Jacobi Gauss-Newton: no state but a step count,
    ``O((m + n) r²)`` work. Leaves that are no LowRank nodes pass unchanged. Place it
    before momentum or Adam.

    Of a pair with a frozen factor, as :func:`lrjax.partition` leaves it (LoRA-FA:
    ``LowRank(left, None)``, the right one in the other half), the factor that is trained
    moves in every step. The frozen one is read from ``tx.update(…, frozen=frozen)``; it
    has no state and no gradient, and the Gram matrix of the other one is not formed.

    Of adapters the pairs alone are changed, each by the partner in its node. Magnitudes,
    gates, cores and whole weights pass, and so do the factors of a trained pool (tied
    adapters), which are no node: their product is no weight of the model.

    Without damping it needs a start near the truth or LoRA's: where both factors are small
    and as wide as the rank, first steps are long, and half of all runs never settle. A
    constant damping stalls at a level of its own. ``scale_by_gram(1.0, loss_power=0.5)``
    needs no thought where the loss is the half of squared errors of order one: its damping
    falls with the error, and it converged from all starts, widths and condition numbers of
    the benchmark ``gram_damping``.

    Args:
        damping: ``λ``, or its ratio to the mean squared column norm ``tr(Gram)/r`` of the
            other factor, see ``relative``. A number, or an optax schedule of the step.
            Never less than the rounding error of the Gram matrix, so 0 is safe.
        relative: if True, ``damping`` multiplies ``tr(Gram)/r``; if False it is absolute.
        order: ``"jacobi"`` updates both factors from the old pair. ``"alternating"``
            updates ``left`` in the steps 0, 2, …, ``right`` in the steps 1, 3, …, each
            with a gradient taken after the other's update (Gauss-Seidel), and gives
            zeros to the other factor. Without damping, of a loss that is L-smooth in the
            product ``X``, such a step with a learning rate ``η ≤ 1/L`` lowers the loss by
            ``η/2 ‖G Q‖²`` at least, with ``Q`` an orthonormal basis of the partner's
            columns: for any rank and condition, and for a partner that is deficient in
            rank as well. ``η = 1`` for a squared loss of an identity operator is
            alternating least squares. ``"greedy"`` moves the factor of which the step
            promises more, ``⟨G_l, P_l⟩`` or ``⟨G_r, P_r⟩`` (of ``phi=None`` the squared
            norms of the whitened gradients), for each node and each member of a stack;
            the same bound holds.
        phi: applied to the whitened gradient ``(G_l K_r, G_r K_l)``, where
            ``K Kᵀ = (Gram + λI)⁻¹``, before the second half ``Kᵀ`` of the whitening. It
            should commute with a rotation of the columns of either factor, as
            :func:`unit_norm` or a polar factor do. A factor that is frozen is ``None``.

            Or an optax transform, for what has a memory: momentum (``optax.trace``,
            ``optax.ema``), :func:`scale_by_matrix_adam`, a chain of these and of
            functions (``optax.clip_by_global_norm``). It sees the tree of the gradients in
            orthonormal frames of the partners, ``G_l K_r = G Q_r`` with ``Q_r = right
            K_r`` and undamped ``K``, and its moments follow the frames, ``M ← M Pᵀ`` with
            ``P = Q_newᵀ Q_old``: that projects the moment ``M Q_oldᵀ`` of the product on
            the new span. The way back is ``K⁻¹ (Gram + λI)⁻¹``. So momentum keeps its
            meaning when the partner moves, and without damping the trajectory of the
            product does not depend on how it is split. Momentum before this transform
            would average gradients that are taken along different partners.
        loss_power: multiplies λ by ``max(value − f_min, 0)**loss_power``, with the loss
            from the extra argument ``value``: 1 makes the damping proportional to the
            optimality gap, 0.5 to its root. ``None``: the loss is not read.
        f_min: the smallest value of the loss, for ``loss_power``. ``update(..., f_min=…)``
            overrides it for one step, for rules that estimate it on the way.

    Returns:
        An optax transform; ``update`` needs ``params``, ``value`` for ``loss_power``,
        and ``frozen`` where a factor is frozen.

    Raises:
        ValueError: at construction, for negative damping or an unknown order; in
            ``init``, if the tree holds no LowRank node, or ``phi`` keeps moments that
            cannot follow a frame (the elementwise ones of Adam); in ``update``, if
            ``params`` or ``value`` is missing, or a factor is in none of the trees.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> x = lrjax.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0]]))
        >>> grad = lrjax.LowRank(jnp.array([[4.0], [8.0]]), jnp.array([[50.0]]))
        >>> tx = lrjax.scale_by_gram()
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(step.left.ravel().round(4), step.right.round(4))
        [1. 2.] [[2.]]

        Momentum of the product rather than of the factors, and a matrix Adam:

        >>> tx = lrjax.scale_by_gram(phi=optax.trace(0.9))
        >>> tx = lrjax.scale_by_gram(1e-6, phi=lrjax.scale_by_matrix_adam(0.9, 0.999))

    Reference:
        T. Tong, C. Ma, Y. Chi, "Accelerating ill-conditioned low-rank matrix estimation
        via scaled gradient descent" (2021), arXiv 2005.08898; damped: X. Xu, Y. Shen,
        Y. Chi, C. Ma, "The power of preconditioning in overparameterized low-rank matrix
        sensing" (2023), arXiv 2302.01186; on LoRA factors: F. Zhang, M. Pilanci,
        "Riemannian preconditioned LoRA for fine-tuning foundation models" (2024), arXiv
        2402.02347; root-of-the-loss damping: J. Zhang, S. Fattahi, R. Zhang,
        "Preconditioned gradient descent for over-parameterized nonconvex matrix
        factorization" (2021), arXiv 2504.09708; moments that follow the partner: X. Yu
        et al., "AltLoRA: towards better gradient approximation in low-rank adaptation with
        alternating projections" (2025), arXiv 2505.12455; the bound of the alternating
        order is the majorization of J. W. Lavington et al., "Target-based surrogates for
        stochastic optimization" (2023), arXiv 2302.02607, with ``X`` as the target.
    """
    check_non_negative("scale_by_gram", "damping", damping)
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}.")
    whitened = None
    if isinstance(phi, optax.GradientTransformation):
        whitened, phi = Whitened(optax.with_extra_args_support(phi), order), None
    counts = callable(damping) or order == "alternating" or whitened is not None

    def init(params):
        check_has_nodes("scale_by_gram", params)
        if not counts:
            return optax.EmptyState()
        moments = () if whitened is None else whitened.init(params)
        return ScaleByGramState(jnp.zeros([], jnp.int32), moments)

    smallest = f_min

    def update(
        updates,
        state,
        params=None,
        *,
        value: Any = None,
        f_min: Any = None,
        frozen: Any = None,
        **extra,
    ):
        del extra
        check_params("scale_by_gram", params)
        strength = damping(state.count) if callable(damping) else damping
        if loss_power is not None:
            check_extra("scale_by_gram(loss_power=…)", value=value)
            gap = value - (smallest if f_min is None else f_min)
            strength = strength * jnp.maximum(gap, 0) ** loss_power
        count: Any = state.count if counts else None
        moments = ()

        def direction(g: LowRank, x: LowRank) -> LowRank:
            move = precondition(g, x, strength, relative, phi)
            return like(g, *jax.tree.leaves(in_turn(order, count, g, move)))

        if whitened is None:
            updates = map_nodes(direction, updates, params, frozen=frozen)
        else:
            updates, moments = whitened.update(
                updates,
                state.phi,
                params,
                frozen=frozen,
                damping=strength,
                relative=relative,
                count=count,
            )
        if counts:
            state = ScaleByGramState(increment(count), moments)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def unit_norm(x: LowRank) -> LowRank:
    """Scale a pair of factors to ``‖left‖² + ‖right‖² = 1``; zero stays zero.

    As the ``phi`` of :func:`scale_by_gram` it normalizes the step in the metric of the
    preconditioner, ``⟨G, P⟩ = 1``: the learning rate is then the length of the step,
    about the Frobenius distance that ``X`` moves.

    Args:
        x: factors ``(*batch, m, r)`` and ``(*batch, n, r)``, scaled for each member of
            the batch.

    Returns:
        The scaled factors.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> lrjax.unit_norm(lrjax.LowRank(jnp.array([[3.0]]), jnp.array([[4.0]]))).left
        Array([[0.6]], dtype=float32)
    """
    over = lambda reduce, x: reduce(x, axis=(-2, -1), keepdims=True)
    largest = [over(jnp.max, jnp.abs(factor)) for factor in jax.tree.leaves(x)]
    scale = nonzero(functools.reduce(jnp.maximum, largest))
    x = jax.tree.map(lambda factor: factor / scale, x)
    squares = [over(jnp.sum, factor**2) for factor in jax.tree.leaves(x)]
    size = jnp.sqrt(nonzero(functools.reduce(jnp.add, squares)))
    return jax.tree.map(lambda factor: factor / size, x)
