"""Progress bars, moved by loops of the host or from within compiled ones."""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from . import _extras
from ._batching import max_member


REPORTS = 100  # of a compiled loop, about


def bar(purpose: str, total: int, *, done: int = 0, unit: str = "it") -> Any:
    """A bar of tqdm, in notebooks one of theirs.

    Args:
        purpose: what needs it, for the error where tqdm is missing.
        total: how much is to be done.
        done: how much is done already.
        unit: of what.
    """
    tqdm = _extras.load("tqdm.auto", "sweep", f"{purpose} with progress=True").tqdm
    return tqdm(total=total, initial=done, unit=unit)


class Meter:
    """A bar that a compiled loop moves, begun anew by every run of the program.

    Under ``vmap`` there is one bar for all members, with the largest of what they show.
    Meters that look alike are equal, so that a program compiled with one serves the others.
    """

    def __init__(self, purpose: str, total: int, shows: str = "loss"):
        self._purpose, self._total, self._shows = purpose, total, shows
        self._bar: Any = None
        _extras.load("tqdm.auto", "sweep", f"{purpose} with progress=True")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Meter) and self._look() == other._look()

    def __hash__(self) -> int:
        return hash(self._look())

    def _look(self) -> tuple[str, int, str]:
        return self._purpose, self._total, self._shows

    def at(self, step: Array, value: Array) -> None:
        """To be called in every step, also traced."""
        step, value = max_member(step), max_member(lax.stop_gradient(value))
        every = max(1, self._total // REPORTS)
        tell = lambda: jax.debug.callback(self._move, step, value)
        lax.cond(step % every == 0, tell, lambda: None)

    def end(self, taken: Array) -> None:
        """To be called behind the loop, with the number of steps it took."""
        jax.debug.callback(self._end, max_member(taken))

    def _move(self, step, value) -> None:
        step = int(step)  # an operation of JAX would wait for the program that calls
        if step == 0 or self._bar is None:
            self._close()
            self._bar = bar(self._purpose, self._total, unit="step")
        self._bar.set_postfix({self._shows: f"{float(value):.3e}"}, refresh=False)
        self._bar.update(step - self._bar.n)

    def _end(self, taken) -> None:
        if self._bar is not None:
            self._bar.update(int(taken) - self._bar.n)
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
