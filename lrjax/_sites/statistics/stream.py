"""Sums over batches, one at a time."""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jaxtyping import PyTree


Call = Callable[[PyTree, Any], PyTree]


def over_batch(model: PyTree, batch: Any) -> PyTree:
    """``jax.vmap(model)(batch)``."""
    return jax.vmap(model)(batch)


def summed(
    name: str, f: Callable[[Any], PyTree], batches: Iterable[Any]
) -> tuple[PyTree, int]:
    """The sum of ``f`` over batches, and how many there were."""
    total, count = None, 0
    for batch in batches:
        new = f(batch)
        total = new if total is None else _added(total, new)
        count += 1
    if total is None:
        raise ValueError(f"{name} was given no batches.")
    return total, count


@jax.jit  # one program for all leaves
def _added(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(operator.add, one, other)


def check_repeatable(name: str, batches: Iterable[Any]) -> None:
    """Refuse an iterator, which a second pass would find empty."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name} with a rank goes through the batches several times, and got an "
            "iterator: pass a list, or leave rank out."
        )
