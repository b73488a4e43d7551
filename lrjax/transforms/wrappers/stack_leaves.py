import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, PyTree

from ..._arguments import checks_trees
from ..._matrices import (
    DefaultRule,
    MatrixLeaf,
    MatrixSpec,
    Where,
    choose,
    is_hidden_matrix,
)
from ..._sharding import sharding_spec


Alike = Callable[[str, tuple[int, int]], Hashable]


@checks_trees
def stack_leaves(
    tx: optax.GradientTransformation,
    where: Where | None = None,
    *,
    alike: Alike | None = None,
    max_size: int | None = 2**14,
) -> optax.GradientTransformationExtraArgs:
    """Run a transform on matrices of one shape as on a single stack of them.

    Leaves of one shape and dtype become one leaf ``(k, *shape)`` in the place of the first
    of them; ``tx`` sees ``optax.MaskedNode()`` in the places of the others, and its updates
    and its state are taken apart again. A model of a hundred small matrices then takes the
    kernels, the branches and the compilation of a few. The state is that of ``tx`` alone,
    array by array and name by name, so that each can read the other's checkpoints.

    ``tx`` has to treat a stack as its members one by one, as all transforms here do: with
    leading axes as a batch of matrices. What it draws at random it draws once for a stack.
    A stack is a copy of its gradients and states: cheap next to the kernels that it saves
    while leaves are small. On CPU a step of 128 × 128 matrices takes three quarters of the
    time, and one of larger ones gets slower; on GPU larger ones may pay too.

    Args:
        tx: any optax transform.
        where: ``(path, shape) -> bool`` or a :class:`~lrjax.subspaces.MatrixSpec`, the
            leaves that may be stacked: give it the rule of ``tx``. By default matrices but
            embeddings and heads. Leaves of different answers are never stacked together,
            nor those of a rule that counts its axes from the front, or that would answer
            otherwise of the stack.
        alike: ``(path, (rows, columns)) -> key``: leaves of different keys are never
            stacked together; for example a rank that is a function of the path.
        max_size: larger leaves stay apart; None for no limit.

    Returns:
        The transform.

    Raises:
        ValueError: at ``init``, if the state keeps something of a stack that is not one for
            each of its members.

    Example:
        >>> import jax.numpy as jnp, lrjax, optax
        >>> tx = lrjax.project_updates(optax.scale_by_adam(), lrjax.subspaces.Power(2))
        >>> params = {name: jnp.zeros((8, 16)) for name in ("key", "query", "value")}
        >>> state = lrjax.stack_leaves(tx).init(params)
        >>> state.inner.mu["query"].shape
        (2, 16)

    Reference:
        The megabatches of the code of K. Ahn et al., "Dion: distributed orthonormalized
        updates" (2025), arXiv 2504.05295. Special case: on one stack ``tx`` itself.
    """
    inner = optax.with_extra_args_support(tx)
    rule = DefaultRule(is_hidden_matrix if where is None else where)
    templates: dict[Hashable, PyTree] = {}

    def init(params):
        stacks = _find_stacks(params, rule, alike, max_size)
        if not stacks.groups:
            return inner.init(params)
        alone = jax.eval_shape(lambda p: inner.init(stacks.first_of(p)), params)
        return stacks.apart(inner.init(stacks.together(params)), alone)

    def template(stacks: _Stacks, updates: PyTree) -> PyTree:
        """The structure of the state of the stacks, which holds nothing for the others."""
        leaves, treedef = jax.tree.flatten(updates)
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        known = treedef, shapes, stacks.groups
        if known not in templates:
            abstract = treedef.unflatten([jax.ShapeDtypeStruct(*x) for x in shapes])
            start = lambda x: inner.init(stacks.together(x))
            templates[known] = jax.eval_shape(start, abstract)
        return templates[known]

    def update(updates, state, params=None, **extra):
        stacks = _find_stacks(updates, rule, alike, max_size)
        if not stacks.groups:
            return inner.update(updates, state, params, **extra)
        alike_tree = lambda x: jax.tree.structure(x) == stacks.treedef
        extra = {k: stacks.together(x) if alike_tree(x) else x for k, x in extra.items()}
        params = None if params is None else stacks.together(params)
        state = stacks.state_together(template(stacks, updates), state)
        out, state = inner.update(stacks.together(updates), state, params, **extra)
        return stacks.apart(out), stacks.apart(state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Stacks(NamedTuple):
    """Which leaves of a tree are stacked, by their places; and how."""

    treedef: Any
    groups: tuple[tuple[int, ...], ...]

    def together(self, tree: PyTree) -> PyTree:
        """The tree with every group as a stack in the place of its first member."""
        parts = self.treedef.flatten_up_to(tree)
        return self._first(parts, lambda *members: jnp.stack(members))

    def first_of(self, tree: PyTree) -> PyTree:
        """The tree with the first member of every group alone."""
        return self._first(self.treedef.flatten_up_to(tree), lambda first, *_: first)

    def _first(self, parts: list[Any], combine: Callable) -> PyTree:
        parts = list(parts)
        for first, *others in self.groups:
            members = parts[first], *(parts[i] for i in others)
            parts[first] = jax.tree.map(combine, *members)
            for i in others:
                parts[i] = optax.MaskedNode()
        return self.treedef.unflatten(parts)

    def apart(self, tree: PyTree, alone: PyTree | None = None) -> PyTree:
        """Undo :meth:`together`, in every subtree that is like the tree.

        ``alone``, if given, is what ``tree`` would be of the first members by themselves.
        """

        def separate(subtree: PyTree, *single: PyTree) -> PyTree:
            parts = self.treedef.flatten_up_to(subtree)
            ones = self.treedef.flatten_up_to(single[0]) if single else parts
            for group in self.groups:
                whole = parts[group[0]]
                if single:
                    _check_stacked(whole, ones[group[0]], len(group))
                for k, i in enumerate(group):
                    parts[i] = jax.tree.map(lambda x, k=k: _member(x, k), whole)
            return self.treedef.unflatten(parts)

        rest = [] if alone is None else [alone]
        return self._in_subtrees(separate, lambda x, *_: x, tree, *rest)

    def state_together(self, template: PyTree, state: PyTree) -> PyTree:
        """Undo :meth:`apart`; the template has the structure that comes out."""
        stack = lambda _, subtree: self.together(subtree)
        return self._in_subtrees(stack, lambda _, x: x, template, state)

    def _in_subtrees(
        self, f: Callable, keep: Callable, tree: PyTree, *rest: PyTree
    ) -> PyTree:
        """``f`` of the subtrees that are like the whole tree, ``keep`` of all else.

        They are known by holding ``optax.MaskedNode()`` for all members but the first.
        """
        if self._is_like(tree):
            return f(tree, *rest)
        below, structure = jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
        if not below or jtu.treedef_is_leaf(structure):
            return keep(tree, *rest)
        columns = zip(below, *map(structure.flatten_up_to, rest), strict=True)
        return structure.unflatten([self._in_subtrees(f, keep, *c) for c in columns])

    def _is_like(self, tree: PyTree) -> bool:
        try:
            parts = self.treedef.flatten_up_to(tree)
        except (TypeError, ValueError):
            return False
        others = (parts[i] for group in self.groups for i in group[1:])
        return all(isinstance(x, optax.MaskedNode) for x in others)


def _member(x: Array, k: int) -> Array:
    if x.ndim > 1 or not jnp.issubdtype(x.dtype, jnp.number):
        return lax.index_in_dim(x, k, keepdims=False)
    # A slice of one number would be a kernel of its own on GPU; sums share one.
    return jnp.sum(jnp.where(jnp.arange(len(x)) == k, x, 0), dtype=x.dtype)


def _check_stacked(whole: PyTree, one: PyTree, size: int) -> None:
    """Refuse a state that is not one of each member along a first axis."""
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True)
    for x, single in pairs:
        if x.shape != (size, *single.shape):
            raise ValueError(
                f"stack_leaves cannot take apart a state that holds {x.shape} for a stack "
                f"of {size} leaves and {single.shape} for one of them: the transform takes "
                "a leaf as a whole and not its matrices one by one. Leave it as it is, or "
                "put stack_leaves around the parts of the chain that work by matrix."
            )


def _find_stacks(
    tree: PyTree, rule: Where, alike: Alike | None, max_size: int | None
) -> _Stacks:
    leaves, values, treedef = choose("stack_leaves", tree, rule)
    groups: dict[Hashable, list[tuple[int, MatrixLeaf]]] = {}
    for i, (leaf, x) in enumerate(zip(leaves, values, strict=True)):
        if leaf is None or max(*leaf.spec.rows, *leaf.spec.cols) >= 0:
            continue
        if max_size is None or math.prod(leaf.shape) <= max_size:
            groups.setdefault(_likeness(leaf, x, alike), []).append((i, leaf))
    found = (
        tuple(i for i, _ in group)
        for group in groups.values()
        if len(group) > 1 and _stays(group[0][1], len(group), rule)
    )
    return _Stacks(treedef, tuple(found))


def _likeness(leaf: MatrixLeaf, x: Any, alike: Alike | None) -> Hashable:
    """What leaves have in common that are stacked together."""
    own = None if alike is None else alike(leaf.path, leaf.sides)
    return leaf.shape, jnp.result_type(x), sharding_spec(x), leaf.spec, own


def _stays(leaf: MatrixLeaf, size: int, rule: Where) -> bool:
    """Whether the rule says of the stack what it says of its members."""
    answer = rule(leaf.path, (size, *leaf.shape))
    spec = answer if isinstance(answer, MatrixSpec) else MatrixSpec()
    return bool(answer) and spec == leaf.spec
