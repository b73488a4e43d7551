from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ..._arguments import checks_trees
from ..._matrices import check_real, named_leaves
from ...lowrank import LowRank


class Pair(NamedTuple):
    """Where a leaf of a foreign tree belongs: one factor of the pair called ``name``.

    ``transpose`` says that the leaf is stored as ``(rank, size)``.
    """

    name: str
    side: Literal["left", "right"]
    transpose: bool = False


def pairs_by_name(
    left: str | Sequence[str],
    right: str | Sequence[str],
    *,
    transpose_left: bool = False,
    transpose_right: bool = True,
) -> Callable[[str], Pair | None]:
    """A rule for :func:`on_pairs`: two leaves whose paths differ in one word are a pair.

    Args:
        left: the word in the path of the left factor, or several of them.
        right: the word in the path of the right factor, or several of them.
        transpose_left: whether the left factor is stored as ``(rank, m)``.
        transpose_right: whether the right factor is stored as ``(rank, n)``.

    Returns:
        A function of a leaf's path.

    Example:
        PEFT's names, ``W + B A`` with ``B (out, r)`` and ``A (r, in)``:

        >>> import lrjax
        >>> rule = lrjax.pairs_by_name(left="lora_B", right="lora_A")
        >>> rule("layer.lora_A")
        Pair(name='layer.*', side='right', transpose=True)

        With adapted embeddings, which PEFT calls otherwise:

        >>> rule = lrjax.pairs_by_name(
        ...     left=["lora_B", "lora_embedding_B"], right=["lora_A", "lora_embedding_A"])
        >>> rule("embed.lora_embedding_B")
        Pair(name='embed.*', side='left', transpose=False)
    """
    lefts, rights = ([x] if isinstance(x, str) else list(x) for x in (left, right))

    def rule(path: str) -> Pair | None:
        for word in lefts:
            if word in path:
                return Pair(path.replace(word, "*"), "left", transpose_left)
        for word in rights:
            if word in path:
                return Pair(path.replace(word, "*"), "right", transpose_right)
        return None

    return rule


@checks_trees
def on_pairs(
    tx: optax.GradientTransformation, rule: Callable[[str], Pair | None]
) -> optax.GradientTransformationExtraArgs:
    """Run a transform for LowRank nodes on a tree that stores its factors otherwise.

    Dicts, Flax NNX states, Haiku or Linen parameters: the leaves that ``rule`` assigns to
    a pair become one ``LowRank`` (transposed if needed), the others stay as they are,
    and ``tx`` sees a flat dict of both. The result has the layout of the input.

    Args:
        tx: any optax transform, for example a chain with :func:`scale_by_gram`.
        rule: maps the path of a leaf (as ``layer.lora_A``) to a :class:`Pair`, or to
            ``None`` for leaves that are no factors. See :func:`pairs_by_name`.

    Returns:
        An optax transform. An extra argument ``grad`` with the structure of the updates
        is regrouped too.

    Raises:
        ValueError: in ``init``, if a pair lacks one of its factors or no leaf is in a
            pair; the message names the paths.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> params = {"lora_A": jnp.full((1, 3), 2.0), "lora_B": jnp.ones((4, 1))}
        >>> rule = lrjax.pairs_by_name(left="lora_B", right="lora_A")
        >>> tx = lrjax.on_pairs(lrjax.scale_by_gram(), rule)
        >>> step, _ = tx.update(params, tx.init(params), params)
        >>> print(step["lora_A"].round(4), step["lora_B"][0].round(4))
        [[0.5 0.5 0.5]] [0.0833]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        check_real("on_pairs", params)
        return tx.init(_group(params, rule))

    def update(updates, state, params=None, **extra):
        grad = extra.get("grad")
        if grad is not None and jax.tree.structure(grad) == jax.tree.structure(updates):
            extra["grad"] = _group(grad, rule)
        grouped_params = None if params is None else _group(params, rule)
        grouped, state = tx.update(_group(updates, rule), state, grouped_params, **extra)
        return _ungroup(grouped, updates, rule), state

    return optax.GradientTransformationExtraArgs(init, update)


def _group(tree: PyTree, rule) -> PyTree:
    leaves, _ = named_leaves(tree)
    if not leaves:  # optax calls init with an empty placeholder
        return tree
    grouped: dict[str, Any] = {}
    sides: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves:
        pair = rule(path)
        if pair is None:
            grouped[path] = leaf
            continue
        factors = sides.setdefault(pair.name, {})
        if pair.side in factors:
            raise ValueError(
                f"on_pairs: the rule gives two {pair.side} factors to the pair "
                f"{pair.name!r}; the second one is {path}."
            )
        factors[pair.side] = jnp.matrix_transpose(leaf) if pair.transpose else leaf
    if not sides:
        paths = ", ".join(grouped)
        raise ValueError(f"on_pairs: the rule matches none of the leaves {paths}.")
    for name, factors in sides.items():
        if len(factors) != 2:
            (side,) = factors
            raise ValueError(
                f"on_pairs: the pair {name!r} has a {side} factor only; the rule must "
                "give every pair one left and one right leaf."
            )
        grouped[name] = LowRank(factors["left"], factors["right"])
    return grouped


def _ungroup(grouped: Any, like: PyTree, rule) -> PyTree:
    def pick(path):
        pair = rule(path)
        if pair is None:
            return grouped[path]
        factor = getattr(grouped[pair.name], pair.side)
        return jnp.matrix_transpose(factor) if pair.transpose else factor

    leaves, treedef = named_leaves(like)
    return treedef.unflatten([pick(path) for path, _ in leaves])
