from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Scalar

from ._field import Field, FlowState, Observed, Occurred, Params


class FlowStats(NamedTuple):
    """How an integration went.

    Attributes:
        time: where it ended: ``t1``, or earlier.
        steps: steps tried.
        rejected: how many of them were too long and done again.
        stopped: whether ``until`` ended it.
        success: whether it came to ``t1`` or to ``until``; ``False`` when ``max_steps``
            ran out first or the step size vanished (a blow-up).
    """

    time: Float[Array, "*batch"]
    steps: Int[Array, "*batch"]
    rejected: Int[Array, "*batch"]
    stopped: Bool[Array, "*batch"]
    success: Bool[Array, "*batch"]


class FlowSolution(eqx.Module):
    """The trajectory of a gradient flow.

    Attributes:
        ts: the times of ``params`` and ``observed``: those asked for, or the final time.
            Times after the end of the integration are infinite.
        params: the parameters at ``ts``, stacked along a new first axis. When ``ts`` was
            left out, or ``observe`` was given: the final parameters alone.
        observed: what ``observe`` returned, stacked as ``ts`` is, or ``None``.
        stats: see :class:`FlowStats`.
    """

    ts: Float[Array, "..."]
    params: PyTree
    observed: PyTree
    stats: FlowStats
    _dense: tuple[Any, Any] | None = None

    def evaluate(self, t: ArrayLike) -> PyTree:
        """The parameters at a time between 0 and the end; needs ``dense=True``.

        Args:
            t: one time.

        Returns:
            The parameters, interpolated to the order of the solver.

        Raises:
            ValueError: if the flow was integrated without ``dense=True``.
        """
        if self._dense is None:
            raise ValueError(
                "evaluate needs a dense solution: call gradient_flow(..., dense=True)."
            )
        path, fixed = self._dense
        return eqx.combine(path.evaluate(t).params, fixed)


def gradient_flow(
    loss: Callable[..., Scalar],
    params: PyTree,
    *args: Any,
    t1: ArrayLike,
    ts: ArrayLike | None = None,
    precondition: optax.GradientTransformation | None = None,
    solver: diffrax.AbstractSolver | str | None = None,
    rtol: ArrayLike | None = None,
    atol: ArrayLike | None = None,
    until: Callable[[FlowState], ArrayLike] | None = None,
    observe: Callable[[FlowState], PyTree] | None = None,
    friction: ArrayLike | Callable[[Array], ArrayLike] | None = None,
    step: ArrayLike | None = None,
    max_steps: int = 2**16,
    dense: bool = False,
    adjoint: diffrax.AbstractAdjoint | None = None,
    progress: bool = False,
) -> FlowSolution:
    """Follow the gradient flow of a loss: gradient descent with infinitely small steps.

    From ``θ(0) = params`` to the time ``t1`` it integrates::

        dθ/dt = −P(∇loss(θ, *args))

    with adaptive steps and error control. ``P`` is any stateless optax transform, so that
    one step of ``optax.chain(P, optax.sgd(h))`` is one Euler step of length ``h``:
    ``optax.identity()``, :func:`lrjax.scale_by_gram`, ``optax.add_decayed_weights``
    (weight decay), :func:`lrjax.scale_factors` (two learning rates), or a chain. With
    ``friction`` γ it follows the heavy ball instead, ``θ'' + γ θ' = −P(∇loss)``.

    Under ``vmap`` every member has its own steps and all wait for the slowest. For many
    small flows alike it is faster to follow one flow of the summed losses of a stack,
    whose members then share their steps.

    Args:
        loss: ``loss(params, *args)``, a scalar. The same function object in a second call
            saves its compilation.
        params: any tree. Floating arrays flow, all else (integers, functions, ``None``)
            stays as it is.
        *args: data. Hand it over here and do not close ``loss`` over it: closed-over
            arrays become constants of the compiled program.
        t1: the final time. The flow starts at 0.
        ts: increasing times in ``[0, t1]`` at which to save.
        precondition: ``P``. A transform whose state changes from step to step has no
            flow and is refused.
        solver: ``None`` or ``"explicit"`` for diffrax's Tsit5. ``"stiff"`` for Kvaerno5,
            which builds a dense Jacobian over all parameters: for at most a few hundred
            of them and condition numbers above 10³. Or any diffrax solver; Dopri8 takes
            fewer steps for a final state at ``rtol <= 1e-10``, but interpolates worse.
        rtol: tolerated error of a step relative to the size of each number; by default
            1e-8 in float64 and 1e-5 in float32.
        atol: tolerated absolute error of a step, in the units of the parameters. By
            default ``rtol`` times the root mean square of ``params``: an escape from a
            small initialization must be decided by the initialization, not the solver.
        until: a rule that ends the flow early: :func:`loss_below`, :func:`gradient_below`,
            :func:`stationary`, or any function of a :class:`FlowState` to a boolean scalar.
            It is asked after every step.
        observe: a function of a :class:`FlowState` to a tree of arrays, saved at ``ts`` in
            place of the parameters.
        friction: γ of the heavy ball, in 1/time; a number or a function of the time.
        step: take steps of this fixed length instead of adaptive ones; with
            ``solver=diffrax.Euler()`` each one is a step of SGD.
        max_steps: the largest number of steps. Running out of them is not an error:
            ``stats.success`` is then ``False``. Dense output and backpropagation need
            memory for this many steps and for its square root, respectively.
        dense: keep the interpolant of every step for :meth:`FlowSolution.evaluate`.
        adjoint: how to differentiate. By default diffrax's recursive checkpointing, for
            reverse mode; ``diffrax.ForwardMode()`` allows ``jax.jvp``.
        progress: show a progress meter.

    Returns:
        A :class:`FlowSolution`.

    Raises:
        TypeError: if ``params`` has no floating arrays, or some of half precision.
        ValueError: if ``precondition`` keeps a state, for an unknown ``solver``, or for
            times that are not increasing within ``[0, t1]``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> loss = lambda x, target: 0.5 * jnp.sum((x - target) ** 2)
        >>> solution = lrjax.gradient_flow(loss, jnp.zeros(2), jnp.ones(2), t1=1.0)
        >>> print(solution.params.round(3))  # 1 - exp(-1)
        [0.632 0.632]

    Reference:
        The integrators are those of P. Kidger, "On neural differential equations" (2021),
        arXiv 2202.02435. Checked against the closed forms of ``lrjax.flows``.
    """
    moving, fixed = eqx.partition(params, eqx.is_inexact_array)
    dtype = _time_dtype(moving, params)
    _check_times(t1, ts)
    _check_stateless(precondition, moving)
    field = Field(loss, precondition, friction, fixed)
    asked = until is not None or observe is not None
    data = (args, field.scales(moving, args) if asked else None)
    start = field.start(moving)

    wanted = Params() if observe is None else Observed(observe, field)
    save = {
        "params": diffrax.SubSaveAt(t1=True, fn=Params()),
        "wanted": diffrax.SubSaveAt(t1=True, fn=wanted)
        if ts is None
        else diffrax.SubSaveAt(ts=jnp.asarray(ts, dtype), fn=wanted),
    }

    rtol = (1e-8 if dtype == jnp.float64 else 1e-5) if rtol is None else rtol
    if atol is None:
        atol = rtol * _typical_size(moving)
    # Arrays, not numbers: those would be compiled in.
    rtol, atol = jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        _solver(solver),
        t0=jnp.zeros([], dtype),
        t1=jnp.asarray(t1, dtype),
        dt0=None if step is None else jnp.asarray(step, dtype),
        y0=start,
        args=data,
        saveat=diffrax.SaveAt(subs=save, dense=dense),
        stepsize_controller=(
            diffrax.PIDController(rtol=rtol, atol=atol)
            if step is None
            else diffrax.ConstantStepSize()
        ),
        event=None if until is None else diffrax.Event(Occurred(until, field)),
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=max_steps,
        throw=False,
        progress_meter=_meter(progress),
    )
    return _result(solution, fixed, ts is not None, observe is not None)


def _result(solution, fixed, on_grid: bool, observes: bool) -> FlowSolution:
    last = lambda tree: jax.tree.map(lambda x: x[-1], tree)
    ts, wanted = solution.ts["wanted"], solution.ys["wanted"]
    if not on_grid:
        ts, wanted = last(ts), last(wanted)
    params = last(solution.ys["params"]) if observes else wanted
    stopped = solution.result == diffrax.RESULTS.event_occurred
    stats = FlowStats(
        time=last(solution.ts["params"]),
        steps=jnp.asarray(solution.stats["num_steps"]),
        rejected=jnp.asarray(solution.stats["num_rejected_steps"]),
        stopped=stopped,
        success=(solution.result == diffrax.RESULTS.successful) | stopped,
    )
    path = solution.interpolation
    dense = None if path is None else (path, fixed)
    observed = wanted if observes else None
    return FlowSolution(ts, eqx.combine(params, fixed), observed, stats, dense)


def _check_times(t1: ArrayLike, ts: ArrayLike | None) -> None:
    """Refuse times that are known and that no flow from 0 to ``t1`` passes in turn."""
    if isinstance(t1, Tracer):
        return
    if not np.all(np.asarray(t1) > 0):
        raise ValueError(
            f"gradient_flow goes from 0 to t1 > 0, got t1={t1}: to go uphill, follow the "
            "flow of the negative loss."
        )
    if ts is None or isinstance(ts, Tracer):
        return
    times = np.asarray(ts)
    if times.ndim != 1 or not times.size or np.any(np.diff(times) <= 0):
        raise ValueError(
            f"gradient_flow saves at increasing times ts of shape (count,), got {ts}."
        )
    # As it is in the precision of the parameters.
    rounding = float(jnp.finfo(jnp.float32).eps)
    if times[0] < 0 or times[-1] > np.max(t1) * (1 + rounding):
        raise ValueError(
            f"gradient_flow saves at times within [0, t1] = [0, {t1}], got ts from "
            f"{times[0]} to {times[-1]}: raise t1, or leave the later times out."
        )


def _time_dtype(moving: PyTree, params: PyTree) -> jnp.dtype:
    leaves = jax.tree.leaves(moving)
    if not leaves:
        found = {getattr(x, "dtype", type(x).__name__) for x in jax.tree.leaves(params)}
        raise TypeError(
            "gradient_flow found no floating array in params: nothing flows. Of "
            f"{sorted(map(str, found))} make arrays with jnp.asarray(x, float)."
        )
    narrow = sorted({str(x.dtype) for x in leaves if jnp.finfo(x.dtype).bits < 32})
    if narrow:
        raise TypeError(
            "gradient_flow needs parameters of float32 or wider: steps of a flow are far "
            f"below the resolution of {', '.join(narrow)}. Cast params first."
        )
    return jnp.result_type(*leaves)


def _typical_size(moving: PyTree) -> Array:
    """The root mean square of all numbers; one where all are zero."""
    leaves = jax.tree.leaves(moving)
    square = sum(jnp.sum(x**2) for x in leaves) / sum(x.size for x in leaves)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 1)


def _check_stateless(precondition, moving: PyTree) -> None:
    if precondition is None:
        return
    state = jax.eval_shape(precondition.init, moving)
    if jax.tree.leaves(state):
        raise ValueError(
            "gradient_flow needs a stateless precondition, but the state of this one "
            f"holds numbers: {state}. Momentum is friction=…; alternating updates of two "
            "factors average to optax.chain(scale_by_gram(), optax.scale(0.5)); schedules "
            "and adaptive methods such as Adam have no flow in the parameters alone."
        )


def _solver(solver) -> diffrax.AbstractSolver:
    if solver is None or solver == "explicit":
        return diffrax.Tsit5()
    if solver == "stiff":
        return diffrax.Kvaerno5()
    if not isinstance(solver, diffrax.AbstractSolver):
        raise ValueError(
            f"solver must be 'explicit', 'stiff' or a diffrax solver, got {solver!r}."
        )
    return solver


def _meter(progress: bool) -> diffrax.AbstractProgressMeter:
    if not progress:
        return diffrax.NoProgressMeter()
    try:
        return diffrax.TqdmProgressMeter()
    except ValueError:  # tqdm is in an extra
        return diffrax.TextProgressMeter()
