"""Trained rows of a table, which PEFT keeps themselves, beside LoRA."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ....lowrank import LowRank
from ...kinds.factors import Factors
from .._config import is_called
from .._names import Module
from ..methods import Part, misfit


SUFFIX = "token_adapter.trainable_tokens_delta"


def _of_inputs(module: Module) -> bool:
    """Whether a token is an input of the matrix, as of a looked-up table."""
    return module.is_embedding and not module.is_transposed


def rows_of(part: Part) -> tuple[list[int], np.ndarray] | None:
    """Which rows an adapter changes, and what they are then; ``None`` of another one."""
    module, own, _ = part
    of_inputs = _of_inputs(module)
    if not isinstance(own, Factors) or own.train != ("left" if of_inputs else "right"):
        return None
    left, right = np.asarray(own.pair.left), np.asarray(own.pair.right)
    picked, change = (right, left) if of_inputs else (left, right)
    plain = own.start is None and own.gate is None and own.mask is None
    is_one = ((picked == 0) | (picked == 1)).all() and (picked.sum(axis=0) == 1).all()
    if not plain or own.thinning is not None or not is_one or own.scale != 1:
        return None
    tokens = np.argmax(picked, axis=0)
    table = module.matrix().T if of_inputs else module.matrix()
    rows = table[tokens].astype(np.float32) + change.T.astype(np.float32)
    return [int(token) for token in tokens], rows.astype(change.dtype)


def read_rows(module: Module, rows: np.ndarray, config: Mapping[str, Any]) -> Factors:
    """The adapter of rows that are in a file, for the tokens in the config."""
    tokens = _tokens(module.name, config.get("trainable_token_indices"))
    of_inputs = _of_inputs(module)
    table = np.asarray(module.read())
    table = table.T if of_inputs else table
    count, width = table.shape
    fits = rows.shape == (len(tokens), width) and len(set(tokens)) == len(tokens)
    if not fits or not tokens or not all(0 <= token < count for token in tokens):
        raise misfit(module, {SUFFIX: rows})
    change = jnp.asarray((rows - table[tokens]).T.astype(rows.dtype))
    picked = np.zeros((count, len(tokens)), rows.dtype)
    picked[tokens, np.arange(len(tokens))] = 1
    factors = (change, jnp.asarray(picked))
    pair = LowRank(*factors) if of_inputs else LowRank(*reversed(factors))
    one = jnp.ones((), jnp.float32)
    return Factors(pair, None, one, None, "left" if of_inputs else "right")


def _tokens(name: str, indices: Any) -> list[int]:
    if isinstance(indices, dict):
        found = [own for key, own in indices.items() if is_called(name, [key])]
        indices = found[0] if found else None
    if not isinstance(indices, list) or not all(type(token) is int for token in indices):
        raise ValueError(
            f"The file has trained rows of {name!r}, and trainable_token_indices of its "
            "config does not tell which."
        )
    return indices
