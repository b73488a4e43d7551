from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ... import _extras
from ..._batching import any_member
from ..._progress import REPORTS, Meter
from ...linalg import nonzero
from ...lowrank import LowRank, relative_step
from ..problems import Problem


class SolveState(NamedTuple):
    """The state of an iteration at the start of a step, as ``observe=`` sees it.

    What ``observe=`` of :func:`lrjax.gradient_flow` sees, :class:`lrjax.flows.FlowState`,
    has these too: one function can watch both.

    Attributes:
        t: the number of steps before.
        params: the matrix, in factors.
        loss: the objective; for a separation the relative residual.
    """

    t: Int[Array, ""]
    params: LowRank
    loss: Float[Array, ""]


Observer = Callable[[SolveState], PyTree]


class History(eqx.Module):
    """What was measured at the start of every step, ``(steps,)`` each.

    Attributes:
        loss: the objective.
        relative_error: distance to the truth, or ``None`` if the truth is not known.
        relative_step: how far the step moved the matrix, to first order,
            ``‖dL Rᵀ + L dRᵀ‖_F / ‖X‖_F``: needs no truth, and falls with the error.
        finite: true where loss and step were finite numbers.
        observed: what ``observe`` returned.
    """

    loss: Float[Array, "..."]
    relative_error: Float[Array, "..."] | None
    relative_step: Float[Array, "..."]
    finite: Bool[Array, "..."]
    observed: PyTree


class Solution(eqx.Module):
    """The result of :func:`solve`.

    Attributes:
        x: the matrix found, in factors.
        state: the state of the optimizer, to continue from.
        history: measurements of every step; after an early stop the last ones repeat.
        steps: the steps taken.
        converged: whether a step became shorter than ``tol`` before they ran out, in a run
            that has not stalled; false without ``tol``.
        stalled: whether the steps had become far too short: against the gradient of the
            end a step at least 100 times as long as the last one lowers the loss. A
            schedule that fell too fast ends so, with steps that look converged. That the
            loss has another, lower minimum elsewhere is not seen. Costs six losses, and
            nothing where it is not used in a jitted function.
    """

    x: LowRank
    state: PyTree
    history: History
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    stalled: Bool[Array, ""]

    def plot(self, ax: Any = None) -> Any:
        """Draw loss, relative error and step size against the steps, logarithmically.

        What ``observe`` returned goes to a second panel: every number, and every entry
        of a vector, is a curve.

        Args:
            ax: matplotlib axes for the first panel alone; by default a new figure.

        Returns:
            The axes of the first panel; those of the second are ``ax.figure.axes[1]``.
        """
        curves = _curves(self.history.observed)
        panels = [ax]
        if ax is None:
            figure = pyplot().figure(layout="constrained")
            panels = figure.subplots(1, 1 + bool(curves), squeeze=False)[0]
        taken = int(self.steps)
        measured = {
            name.replace("_", " "): getattr(self.history, name)
            for name in ("loss", "relative_error", "relative_step")
        }
        for panel, named in zip(panels, (measured, curves), strict=False):
            for name, values in named.items():
                if values is not None:
                    panel.semilogy(values[:taken], label=name)
            panel.set_xlabel("step")
            panel.legend(fontsize="small")
        return panels[0]


def _curves(observed: PyTree) -> dict[str, Array]:
    """The numbers and the entries of vectors in what was observed, by name."""
    curves = {}
    for path, leaf in jtu.tree_flatten_with_path(observed)[0]:
        name = jtu.keystr(path, simple=True, separator=" ").replace("_", " ")
        if leaf.ndim == 1:
            curves[name or "observed"] = leaf
        elif leaf.ndim == 2:
            curves |= {f"{name} {k + 1}".strip(): leaf[:, k] for k in range(leaf.shape[1])}
    return curves


def pyplot() -> Any:
    """matplotlib.pyplot; if it is missing, an error that names the extra."""
    return _extras.load("matplotlib.pyplot", "plot", "A plot")


def solve(
    problem: Problem,
    tx: optax.GradientTransformation,
    init: LowRank,
    *,
    steps: int,
    tol: ArrayLike | None = None,
    keep: Literal["last", "best"] = "last",
    observe: Observer | None = None,
    callback: Callable[[Array, Array], None] | None = None,
    progress: bool = False,
) -> Solution:
    """Minimize the loss of a recovery problem over the factors with any optax optimizer.

    One ``lax.scan``. The optimizer is handed ``value``, the loss, and ``grad``, the raw
    gradient, as extra arguments. Under ``vmap`` every member stops by itself; the
    computation ends when all have.

    Args:
        problem: what to recover.
        tx: the optimizer, for instance :func:`lrjax.opsa`.
        init: the start, for instance of :func:`spectral_init`; its width is the
            largest rank of the result.
        steps: at most as many steps.
        tol: stop when a step moves the matrix by less than ``tol`` times its norm, or
            by something that is not finite. ``None`` takes all steps, and only then can
            the result be differentiated in reverse mode.
        keep: which iterate is returned: the last one, from which the optimizer can go on,
            or that of the smallest loss, for methods whose loss goes up and down.
        observe: a function of a :class:`SolveState` to a tree of arrays, called in every
            step; what it returns is stacked in ``history.observed``. Ready ones:
            :func:`lrjax.recovery.spectrum`, :func:`lrjax.recovery.staircase`.
        callback: called on the host with the step and the loss, about a hundred times.
        progress: show a progress bar with the loss, also of a compiled run; under
            ``vmap`` one, with the largest loss of all members. Needs ``lrjax[sweep]``.

    Returns:
        A :class:`Solution`.

    Raises:
        ValueError: if the start has not the shape of the problem, for ``steps < 1`` or
            an unknown ``keep``.
        ImportError: with ``progress`` where tqdm is not installed.

    Example:
        >>> import jax, lrjax
        >>> key = jax.random.key(0)
        >>> problem = lrjax.matrix_sensing(key, (9, 7), 1, 200, outlier_fraction=0.1)
        >>> start = lrjax.spectral_init(problem, 1, key=key)
        >>> tx = lrjax.scaled_subgradient(f_min=problem.loss(problem.truth))
        >>> solution = lrjax.solve(problem, tx, start, steps=100)
        >>> bool(problem.relative_error(solution.x) < 1e-4)
        True
    """
    if init.shape != problem.shape:
        raise ValueError(
            f"the start has shape {init.shape}, the problem recovers a matrix of shape "
            f"{problem.shape}."
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if keep not in ("last", "best"):
        raise ValueError(f'keep must be "last" or "best", got {keep!r}.')
    # Any: optax's types do not know nodes.
    optimizer = cast(Any, optax.with_extra_args_support(tx))
    meter = Meter("lrjax.solve", steps) if progress else None
    report = _reporter(steps, callback, meter)

    def step(carry: _Carry, index) -> tuple[_Carry, History]:
        x = carry.x
        value, grad = jax.value_and_grad(problem.loss)(x)
        updates, state = optimizer.update(grad, carry.state, x, value=value, grad=grad)
        move = relative_step(x, updates)
        record = History(
            loss=value,
            relative_error=None if problem.truth is None else problem.relative_error(x),
            relative_step=move,
            finite=jnp.isfinite(value) & jnp.isfinite(move),
            observed=None if observe is None else observe(SolveState(index, x, value)),
        )
        report(index, value)
        running = carry.running
        if tol is not None:
            # A NaN compares false, so a member that diverged stops too.
            running = running & (move > tol) & record.finite
        best = None if carry.best is None else carry.best.or_lower(x, value)
        x = cast(LowRank, optax.apply_updates(cast(Any, x), updates))
        return _Carry(x, state, running, carry.taken + 1, best), record

    best = _Best(init, jnp.array(jnp.inf, init.dtype)) if keep == "best" else None
    zero = jnp.zeros((), jnp.int32)
    start = _Carry(init, optimizer.init(init), jnp.array(True), zero, best)
    if tol is None:
        end, history = lax.scan(step, start, jnp.arange(steps))
    else:
        end, history = scan_until_stopped(step, start, steps)
    if meter is not None:
        meter.end(end.taken)
    x = end.x
    if end.best is not None:
        x = end.best.or_lower(x, problem.loss(x)).x
    stalled = _too_short(problem, end.x, history.relative_step[-1])
    converged = ~end.running & history.finite[-1] & ~stalled
    return Solution(x, end.state, history, end.taken, converged, stalled)


class _Best(eqx.Module):
    x: LowRank
    loss: Array

    def or_lower(self, x: LowRank, loss: Array) -> "_Best":
        """The better of this and another iterate; what is not finite is never better."""
        loss = loss.astype(self.loss.dtype)
        return _where(loss < self.loss, _Best(x, loss), self)


class _Carry(eqx.Module):
    x: LowRank
    state: PyTree
    running: Array
    taken: Array
    best: _Best | None


TOO_SHORT = 100  # a step that could be as many times longer has come to a stop too early


def _too_short(problem: Problem, x: LowRank, last: Array) -> Array:
    """Whether the loss falls by a step against the gradient that is much longer."""
    problem, x, last = jax.tree.map(lax.stop_gradient, (problem, x, last))
    value, grad = jax.value_and_grad(problem.loss)(x)
    eps = jnp.finfo(value.dtype).eps
    unit = jax.tree.map(lambda g: g / nonzero(relative_step(x, grad)), grad)
    moves = TOO_SHORT * jnp.maximum(last, eps) * 10.0 ** jnp.arange(5)

    def loss_after(move):
        return problem.loss(jax.tree.map(lambda a, u: a - move * u, x, unit))

    # A step of more than the matrix itself says nothing about the last ones.
    losses = jnp.where(moves < 1, lax.map(loss_after, moves.astype(value.dtype)), jnp.inf)
    return jnp.min(losses) < value - 16 * eps * jnp.abs(value)


def scan_until_stopped(step: Callable, start: PyTree, steps: int):
    """Scan a step; members no longer ``running`` keep their values and last record."""

    def guarded(carry, index):
        def advance(old):
            new, record = step(old[0], index)
            return _where(old[0].running, (new, record), old)

        carry = lax.cond(any_member(carry[0].running), advance, lambda old: old, carry)
        return carry, carry[1]

    first = jax.eval_shape(step, start, jnp.zeros((), jnp.int32))[1]
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    (end, _), history = lax.scan(guarded, (start, blank), jnp.arange(steps))
    return end, history


def _where(predicate: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), new, old)


def _reporter(
    steps: int, callback: Callable | None, meter: Meter | None
) -> Callable[[Array, Array], None]:
    """A function of step and loss that tells the host about a hundred times."""
    every = max(1, steps // REPORTS)

    def report(index: Array, value: Array) -> None:
        if meter is not None:
            meter.at(index, value)
        if callback is not None:
            tell = partial(jax.debug.callback, callback, index, value)
            lax.cond(index % every == 0, tell, lambda: None)

    return report
