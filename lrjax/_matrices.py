"""Which leaves of a tree are matrices, and how a leaf is seen as a batch of them."""

import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ._sharding import by_layer, placed_like, shards_of


Side = Literal["short", "long", "left", "right"]
Rank = int | float | Callable[[str, tuple[int, int]], int]

_HEAD_OR_EMBEDDING = re.compile(
    r"(.*_)?(heads?|classifier|logits?|score|emb|wte|wpe)|.*embed.*|.*vocab.*"
)
_NORM_OR_BIAS = re.compile(r"(.*_)?(bias|scale|gain|gamma|beta|ln|norm\d*)|.*layer_?norm.*")
_LEAF_NAMES = {"weight", "bias", "kernel", "value"}
# Flax names: the kernels of attention hold the heads as an axis of their own.
_FLAX_PROJECTIONS = {"query", "key", "value"}


class MatrixSpec(NamedTuple):
    """Which axes of a leaf are the rows and the columns of its matrices.

    The axes named in neither are batch axes: each of their positions is a matrix with
    a basis of its own.

    Args:
        rows: axes that together index the rows.
        cols: axes that together index the columns.
        blocks: into how many equal blocks the rows are cut, each a matrix of its own: the
            heads of a fused projection. They become the last batch axis.

    Example:
        >>> import lrjax
        >>> conv = lrjax.MatrixSpec(rows=(0,), cols=(1, 2, 3))
        >>> lrjax.subspaces.matrix_shape((8, 4, 3, 3), conv)
        (8, 36)
    """

    rows: tuple[int, ...] = (-2,)
    cols: tuple[int, ...] = (-1,)
    blocks: int = 1


Where = Callable[[str, tuple[int, ...]], bool | MatrixSpec]


def path_name(path: tuple) -> str:
    """The path of a node as ``layers.0.weight``, the one spelling; ``""`` at the root."""
    return jtu.keystr(path, simple=True, separator=".")


def named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a tree with their :func:`path_name`, and the structure above them.

    The variables of Flax NNX have the name of what they hold: it shows them at ``init``
    and their values alone at ``update``.
    """
    flat, treedef = jtu.tree_flatten_with_path(tree, is_leaf=is_leaf)
    variables = set()
    if any(path[-1:] == (jtu.GetAttrKey("value"),) for path, _ in flat):
        nodes = jtu.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]
        variables = {path for path, node in nodes if _is_variable(node)}
    own = lambda path: path[:-1] if path[:-1] in variables else path
    return [(path_name(own(path)), leaf) for path, leaf in flat], treedef


def _is_variable(x: Any) -> bool:
    names = ((cls.__module__.split(".")[0], cls.__name__) for cls in type(x).__mro__)
    return ("flax", "Variable") in names


def check_real(function: str, tree: PyTree) -> None:
    """Refuse complex leaves, whose squares and signs would silently be wrong."""
    for path, x in jtu.tree_flatten_with_path(tree)[0]:
        if eqx.is_array_like(x) and jnp.iscomplexobj(x):
            name = path_name(path) or "the root"
            raise TypeError(
                f"{function} is for real parameters, but {name} is {x.dtype}: keep it from "
                "this transform with optax.masked or optax.partition, or store real and "
                "imaginary parts as two leaves."
            )


class DefaultRule(NamedTuple):
    """A rule that a function falls back on, and that therefore may match nothing."""

    rule: Where

    def __call__(self, path: str, shape: tuple[int, ...]) -> bool | MatrixSpec:
        """The answer of the rule."""
        return self.rule(path, shape)


def is_head_or_embedding(path: str) -> bool:
    """Whether a part of the path is called like an output head or an embedding."""
    parts = path.lower().split(".")
    return any(
        _HEAD_OR_EMBEDDING.fullmatch(part)
        and not _are_attention_heads(part, parts[k + 1 :])
        for k, part in enumerate(parts)
    )


def _are_attention_heads(part: str, below: list[str]) -> bool:
    """Whether ``heads`` holds layers with names of their own: ``heads.0.query``."""
    named = [name for name in below if not name.isdigit() and name not in _LEAF_NAMES]
    return part.endswith("heads") and bool(named)


def is_norm_or_bias(path: str) -> bool:
    """Whether a part of the path is called like a bias or the scale of a norm."""
    return any(map(_NORM_OR_BIAS.fullmatch, path.lower().split(".")))


def is_hidden_matrix(path: str, shape: tuple[int, ...]) -> bool | MatrixSpec:
    """The default choice of what to project: matrices that are no embedding or head.

    A leaf counts if its last two axes are at least 8 long (leading axes are stacked
    layers, heads or experts) and no part of its path is called like an embedding, a
    vocabulary, an output head, a norm or a bias. Shapes alone cannot tell a head from a
    hidden layer, so replace this rule where the names differ. In the attention kernels of
    Flax, ``query.kernel (in, heads, size)`` and ``out.kernel (heads, size, in)``, the two
    axes of the heads make one side of the matrix.

    Args:
        path: the path of the leaf, as ``layers.0.mlp.weight``.
        shape: its shape.

    Returns:
        Whether to project it; for the attention kernels of Flax, along which axes.

    Example:
        >>> import lrjax
        >>> lrjax.subspaces.is_hidden_matrix("mlp.weight", (16, 32))
        True
        >>> lrjax.subspaces.is_hidden_matrix("lm_head.weight", (16, 32))
        False
    """
    if len(shape) < 2 or is_head_or_embedding(path) or is_norm_or_bias(path):
        return False
    spec = _attention_kernel(path.split("."), len(shape)) or MatrixSpec()
    return min(matrix_shape(shape, spec)[-2:]) >= 8 and (spec == MatrixSpec() or spec)


def _attention_kernel(parts: list[str], ndim: int) -> MatrixSpec | None:
    if ndim < 3 or parts[-1] != "kernel":
        return None
    if not _FLAX_PROJECTIONS.isdisjoint(parts[-2:-1]):
        return MatrixSpec(rows=(-3,), cols=(-2, -1))
    return MatrixSpec(rows=(-3, -2), cols=(-1,)) if parts[-2:-1] == ["out"] else None


def is_input_first(path: str) -> bool:
    """Whether a weight is stored ``(inputs, outputs)``, as the kernels of Flax are."""
    return "kernel" in path.split(".")[-2:]


def matrix_axes(ndim: int, spec: MatrixSpec) -> tuple[list[int], list[int], list[int]]:
    """The batch axes, the rows and the columns of a leaf, counted from the front."""
    rows = [axis % ndim for axis in spec.rows]
    cols = [axis % ndim for axis in spec.cols]
    if len({*rows, *cols}) != len(rows) + len(cols) or not rows or not cols:
        raise ValueError(
            f"{spec} must name different axes for rows and columns, at least one each, "
            f"of a leaf with {ndim} axes."
        )
    batch = [axis for axis in range(ndim) if axis not in rows and axis not in cols]
    return batch, rows, cols


def matrix_shape(shape: tuple[int, ...], spec: MatrixSpec) -> tuple[int, ...]:
    """The shape ``(batch…, m, n)`` of the matrices of a leaf."""
    if not isinstance(spec.blocks, int) or spec.blocks < 1:
        raise ValueError(
            f"MatrixSpec cuts the rows into blocks of one size, blocks being their number; "
            f"got blocks={spec.blocks!r}. Where the parts of a fused projection differ, as "
            "with 32 query, 8 key and 8 value heads, cut it into single heads, blocks=48, "
            "or keep the parts in arrays of their own."
        )
    batch, rows, cols = matrix_axes(len(shape), spec)
    heads = () if spec.blocks == 1 else (spec.blocks,)
    m, rest = divmod(_product(shape, rows), spec.blocks)
    if rest:
        raise ValueError(
            f"{spec} cannot cut the {_product(shape, rows)} rows of a leaf of shape "
            f"{shape} into {spec.blocks} equal blocks."
        )
    return (*(shape[a] for a in batch), *heads, m, _product(shape, cols))


def _product(shape: tuple[int, ...], axes: list[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


class MatrixLeaf(NamedTuple):
    """A leaf that is treated as matrices: all that is known before any number is.

    Attributes:
        path: its path in the tree.
        index: its place among the chosen leaves; its random numbers depend on it. Leaves
            that are left alone do not count, so that a mask may hide them or not.
        spec: which axes make its matrices.
        shape: its shape.
    """

    path: str
    index: int
    spec: MatrixSpec
    shape: tuple[int, ...]

    @property
    def sides(self) -> tuple[int, int]:
        """The rows and columns of one matrix."""
        m, n = matrix_shape(self.shape, self.spec)[-2:]
        return m, n

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of the stack of matrices."""
        return matrix_shape(self.shape, self.spec)[:-2]

    def view(
        self, x: Array, axis: int | None = None, width: int | None = None
    ) -> Float[Array, "*b m n"]:
        """A gradient as matrices ``(batch…, m, n)``, spread by layer where that helps.

        On an Explicit mesh a stack whose matrices are sharded along ``axis`` is cut by
        layer instead; see ``lrjax._sharding.by_layer``.
        """
        return by_layer(self.matrices(x), axis, width)

    def matrices(self, x: Array) -> Float[Array, "*b m n"]:
        """The leaf as matrices ``(batch…, m, n)``; a no-op where it already is one."""
        batch, rows, cols = matrix_axes(x.ndim, self.spec)
        order = batch + rows + cols
        if order != list(range(x.ndim)):
            x = x.transpose(order)
        if len(rows) == len(cols) == self.spec.blocks == 1:
            return x
        self._check_sharding(x, len(batch), len(rows))
        return x.reshape(matrix_shape(self.shape, self.spec))

    def _check_sharding(self, x: Array, first_row: int, rows: int) -> None:
        """Refuse shardings that would not survive the reshape to matrices."""
        shards = shards_of(x)
        inside = [n for k, n in enumerate(shards) if k not in (first_row, first_row + rows)]
        heads = 1 if self.spec.blocks == 1 else shards[first_row]
        if math.prod(inside[first_row:]) > 1 or self.spec.blocks % heads:
            raise ValueError(
                f"{self.path or 'The root'} of shape {self.shape} is sharded on an "
                f"Explicit mesh along an axis that {self.spec} merges behind another one, "
                "or cuts into fewer blocks than there are shards. Shard the first of the "
                "axes that make a side, as the heads of an attention kernel, or a batch "
                "axis; or use Auto axes."
            )

    def restore(self, x: Float[Array, "*b m n"], like: Array | None = None) -> Array:
        """Undo :meth:`matrices`, in the sharding of ``like`` if that is given."""
        x = self._restored(x)
        return x if like is None else placed_like(x, like)

    def _restored(self, x: Float[Array, "*b m n"]) -> Array:
        batch, rows, cols = matrix_axes(len(self.shape), self.spec)
        order = batch + rows + cols
        x = x.reshape([self.shape[axis] for axis in order])
        if order == list(range(len(order))):
            return x
        return x.transpose([order.index(axis) for axis in range(len(order))])

    def projects_rows(self, side: Side) -> bool:
        """Whether a basis on ``side`` lives in the row index space.

        Ties of "short" and "long" go to the left, ``P (m, r)``.
        """
        m, n = self.sides
        answers = {"short": m <= n, "long": m >= n, "left": True, "right": False}
        if side not in answers:
            raise ValueError(f"side must be one of {list(answers)}, got {side!r}.")
        return answers[side]

    def rank(self, rank: Rank) -> int:
        """An int, a fraction of ``min(m, n)`` or a callable's answer, as an int."""
        return resolve_rank(rank, self.path, *self.sides)


def resolve_rank(rank: Rank, path: str, m: int, n: int) -> int:
    """The rank of an ``m × n`` matrix, never above what it can have."""
    full = min(m, n)
    value = rank(path, (m, n)) if callable(rank) else rank
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(
                f"A rank given as a fraction must be in (0, 1], got {value} at {path}."
            )
        value = max(1, round(value * full))
    if isinstance(value, np.integer):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"rank must be a positive int, a fraction in (0, 1] or a callable of (path, "
            f"(rows, columns)) that gives a positive int; got {value!r} at {path}. It "
            "decides shapes: within optax.inject_hyperparams name it in static_args."
        )
    return min(value, full)


def choose(
    function: str, tree: PyTree, where: Where | None
) -> tuple[list[MatrixLeaf | None], list[Any], Any]:
    """Which leaves of a tree are matrices to treat, all leaves, and the structure.

    Args:
        function: who asks, for the errors.
        tree: parameters or updates.
        where: which leaves; None stands for :func:`is_hidden_matrix` and may match none.

    Raises:
        ValueError: if ``where`` chooses a leaf that is no matrix, or none at all.
        TypeError: for a complex leaf.
    """
    check_real(function, tree)
    rule = DefaultRule(is_hidden_matrix) if where is None else where
    flat, treedef = named_leaves(tree)
    leaves: list[MatrixLeaf | None] = []
    chosen = 0
    for name, x in flat:
        shape = tuple(jnp.shape(x))
        spec = rule(name, shape)
        # A NumPy bool or a one-element array says yes or no as well as a bool.
        if not isinstance(spec, MatrixSpec):
            spec = MatrixSpec() if spec else None
        if spec is None:
            leaves.append(None)
            continue
        if len(shape) < 2:
            raise ValueError(
                f"where= chose {name or 'the root'} of shape {shape}, which is no matrix: "
                "return False for leaves with fewer than two axes."
            )
        leaves.append(MatrixLeaf(name, chosen, spec, shape))
        chosen += 1
    if not isinstance(rule, DefaultRule) and flat and not chosen:
        some = ", ".join(name or "the root" for name, _ in flat[:5])
        raise ValueError(
            f"The where= of {function} chose none of {some}: it is called as where(path, "
            "shape), with paths as written here, and answers True, False or a MatrixSpec."
        )
    return leaves, [x for _, x in flat], treedef


def keep(x: Any, *states: Any) -> tuple[Any, ...]:
    """What :func:`map_matrices` does to a leaf that is not chosen: nothing."""
    return (x, *states)


def map_matrices(
    function: str,
    where: Where | None,
    f: Callable[..., tuple],
    tree: PyTree,
    *states: PyTree,
    rest: Callable[..., tuple] = keep,
    results: int | None = None,
) -> tuple[Any, ...]:
    """Map over the leaves of a tree, the chosen matrices apart from the others.

    Args:
        function: who asks, for the errors.
        where: which leaves; see :func:`choose`.
        f: ``(leaf, x, *states of the leaf) -> results``, for each chosen leaf.
        tree: decides the structure.
        *states: trees with one subtree for each leaf of ``tree``.
        rest: ``(x, *states of the leaf) -> results``, for each other leaf.
        results: how many there are; as many as trees are given by default.

    Returns:
        One tree for each result.
    """
    leaves, values, treedef = choose(function, tree, where)
    columns = [treedef.flatten_up_to(state) for state in states]
    rows = [
        rest(x, *own) if leaf is None else f(leaf, x, *own)
        for leaf, x, *own in zip(leaves, values, *columns, strict=True)
    ]
    count = 1 + len(states) if results is None else results
    return tuple(treedef.unflatten([row[k] for row in rows]) for k in range(count))


def map_init(
    function: str,
    where: Where | None,
    f: Callable[..., tuple],
    params: PyTree,
    results: int,
) -> tuple[Any, ...]:
    """:func:`map_matrices` for first states: leaves that are not chosen have none."""
    none = lambda x: (optax.MaskedNode(),) * results
    return map_matrices(function, where, f, params, rest=none, results=results)


def decays(params: PyTree) -> PyTree:
    """The default mask of weight decay: matrices, but no bias and no scale of a norm."""
    flat, treedef = named_leaves(params)
    return treedef.unflatten(
        [jnp.ndim(x) >= 2 and not is_norm_or_bias(name) for name, x in flat]
    )
