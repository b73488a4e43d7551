from typing import Any

import jax
import optax
from jaxtyping import Array, ArrayLike, Int, PyTree

from ..._tree import map_factors
from ...lowrank import is_low_rank


def only_factors(tree: PyTree) -> PyTree:
    """The same tree with nothing in it but the factors of LowRank nodes."""
    keep = lambda x: x if is_low_rank(x) else optax.MaskedNode()
    checked = map_factors(lambda factor: factor, tree)  # refuses factors masked one by one
    return jax.tree.map(keep, checked, is_leaf=is_low_rank)


def put_factors(tree: PyTree, factors: PyTree) -> PyTree:
    """A tree with other factors in its LowRank nodes."""
    put = lambda x, new: new if is_low_rank(x) else x
    return jax.tree.map(put, tree, factors, is_leaf=is_low_rank)


def at(number: optax.ScalarOrSchedule, count: Int[Array, ""]) -> Any | ArrayLike:
    """A number, or that of a schedule."""
    return number(count) if callable(number) else number
