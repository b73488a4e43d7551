from collections.abc import Sequence
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._dense import dense
from ..._matrices import named_leaves
from ..._sites import Where, find_sites, flat_leaves, pick
from ...linalg import check_rank, working_dtype
from ._weights import Node, apply, check_input, dense_linear, made_of, spectral


Start = Literal["stepwise", "average", "lower"]


class _ChangedLinear(eqx.Module):
    """``(W + left rightᵀ) x + b`` with a dense ``W`` that it is lent for a call."""

    weight: Any  # None between calls
    change: Node | None
    bias: Array | None

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        del key
        check_input(self, x, self.weight.shape[-1:])
        y = dense(x, self.weight)
        if self.change is not None:
            y = y + apply(self.change, x).astype(y.dtype)
        return y if self.bias is None else y + self.bias


class RecursiveBlocks(eqx.Module):
    """Blocks of a deep model that share their matrices, each with a low-rank change.

    ``L`` blocks are ``loops`` rounds through ``K = L / loops`` of them: block ``l`` has the
    matrices ``W'_{l mod K} + left_l right_lᵀ``. What is no matrix of a linear layer, biases
    and norms say, is that of each depth. At full rank the model is the one that it was made
    of, at rank 0 pure recursion. It is scanned over the depth, so one block is compiled.

    Made by :func:`share_blocks`.

    Attributes:
        weights: the shared matrices by path, ``(K, out, in)``.
        own: the blocks without them, ``(loops, K, …)``; the changes are in here.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> keys = jax.random.split(jax.random.key(0), 6)
        >>> blocks = [eqx.nn.MLP(8, 8, 32, 1, key=key) for key in keys]
        >>> model = lrjax.nn.share_blocks(blocks, loops=3, rank=2)
        >>> model(jnp.ones(8)).shape, model.weights["layers.0"].shape
        ((8,), (2, 32, 8))

    Reference:
        S. Bae et al., "Relaxed recursive transformers: effective parameter sharing with
        layer-wise LoRA" (2024), arXiv 2410.20672.
    """

    weights: dict[str, Float[Array, "k out in"]]
    own: PyTree

    def __call__(self, x: Any, *args: Any, key: PRNGKeyArray | None = None) -> Any:
        """All blocks, one after the other.

        Args:
            x: what the first block takes, and every one gives.
            *args: further arguments of every block.
            key: split into one for each block, if there is one.

        Returns:
            What the last block gives.
        """
        arrays, static = eqx.partition(self.own, eqx.is_array)
        depths = jax.tree.leaves(arrays)[0].shape[:2]
        keys = None if key is None else jr.split(key, depths)

        def block(x, parts):
            weights, own, key = parts
            one = _lend(eqx.combine(own, static), weights)
            return one(x, *args, **({} if key is None else {"key": key})), None

        def loop(x, parts):
            return lax.scan(block, x, (self.weights, *parts))[0], None

        return lax.scan(loop, x, (arrays, keys))[0]

    def unrolled(self) -> list[PyTree]:
        """The blocks one by one, as those that they were made of, the changes added."""
        arrays, static = eqx.partition(self.own, eqx.is_array)
        depths = jax.tree.leaves(arrays)[0].shape[:2]
        blocks = []
        for b, k in np.ndindex(*depths):
            own = jax.tree.map(lambda x, at=(b, k): x[at], arrays)
            weights = {path: w[k] for path, w in self.weights.items()}
            one = _lend(eqx.combine(own, static), weights)
            plain = lambda x: _plain(x) if _is_changed(x) else x
            blocks.append(jax.tree.map(plain, one, is_leaf=_is_changed))
        return blocks


def share_blocks(
    blocks: Sequence[PyTree] | PyTree,
    *,
    loops: int,
    rank: int,
    start: Start = "average",
    where: Where = None,
) -> RecursiveBlocks:
    """Blocks that share their matrices, made of blocks that do not.

    Each shared ``W'_k`` is found from the ``W_l`` of its depths ``l = k, k + K, …``; what
    these have more is truncated, ``left_l right_lᵀ ≈ W_l − W'_k``.

    Args:
        blocks: ``L`` blocks of one structure, a list or a stack with a leading axis.
        loops: how often each shared block is used; it divides ``L``.
        rank: of the changes; 0 for none.
        start: the ``"average"`` of the ``W_l``, best with changes; the ``"lower"`` blocks
            ``0 … K − 1``; or ``"stepwise"``, evenly spaced from the first block to the
            last, best without changes.
        where: which linear layers of a block, as of :func:`lrjax.adapt`; all by default.

    Returns:
        The module, to be called in the place of the blocks.

    Raises:
        ValueError: for blocks of different structure, a number of loops that does not
            divide them, a rank that a matrix cannot have, or an unknown start.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax
        >>> keys = jax.random.split(jax.random.key(0), 6)
        >>> blocks = [eqx.nn.MLP(8, 8, 32, 1, key=key) for key in keys]
        >>> model = lrjax.nn.share_blocks(blocks, loops=3, rank=8)
        >>> x = y = jnp.ones(8)
        >>> for block in blocks:
        ...     y = block(y)
        >>> bool(jnp.allclose(model(x), y, atol=1e-5))
        True

    Reference:
        S. Bae et al., "Relaxed recursive transformers: effective parameter sharing with
        layer-wise LoRA" (2024), arXiv 2410.20672.
    """
    if start not in get_args(Start):
        raise ValueError(f"start must be one of {get_args(Start)}, got {start!r}.")
    stack = _stacked(blocks) if isinstance(blocks, list | tuple) else blocks
    depth = jax.tree.leaves(eqx.filter(stack, eqx.is_array))[0].shape[0]
    if loops < 1 or depth % loops:
        raise ValueError(f"loops must divide the {depth} blocks, got {loops}.")
    each = depth // loops
    by_loop = lambda x: x.reshape(loops, each, *x.shape[1:]) if eqx.is_array(x) else x
    sites = pick(find_sites(stack), where)
    weights, layers = {}, {}
    for path, site in sites.items():
        _check_site(site)
        matrices = by_loop(site.layer.weight)
        shared = _shared(matrices, start)
        weights[path] = shared
        change = None
        if rank:
            check_rank(rank, matrices.shape)
            rest = _wide(matrices) - _wide(shared)[None]
            change = spectral(rest, rank, "pair", matrices.dtype)
        bias = None if site.layer.bias is None else by_loop(site.layer.bias)
        layers[path] = _ChangedLinear(None, change, bias)
    leaves, treedef = flat_leaves(stack)
    new = [
        layers[path] if path in layers else jax.tree.map(by_loop, leaf)
        for path, leaf in leaves
    ]
    return RecursiveBlocks(weights, treedef.unflatten(new))


def _shared(matrices: Float[Array, "b k m n"], start: Start) -> Float[Array, "k m n"]:
    """The matrices that all loops use."""
    loops, each, *shape = matrices.shape
    if start == "average":
        return jnp.mean(_wide(matrices), axis=0).astype(matrices.dtype)
    if start == "lower":
        return matrices[0]
    steps = np.round(np.linspace(0, loops * each - 1, each)).astype(int)
    return matrices.reshape(-1, *shape)[steps]


def _wide(x: Array) -> Array:
    return x.astype(working_dtype(x.dtype))


def _stacked(blocks: Sequence[PyTree]) -> PyTree:
    """A list of blocks as one with a leading axis."""
    parts = [eqx.partition(block, eqx.is_array) for block in blocks]
    kinds = {str(jax.tree.map(jnp.shape, arrays)) for arrays, _ in parts}
    if len(kinds) != 1:
        raise ValueError(
            "share_blocks needs at least one block, and all of one structure with arrays "
            f"of the same shapes; got {len(parts)} that differ."
        )
    arrays = jax.tree.map(lambda *x: jnp.stack(x), *(arrays for arrays, _ in parts))
    return eqx.combine(arrays, parts[0][1])


def _check_site(site: Any) -> None:
    if type(site.layer) is not eqx.nn.Linear or len(site.stack) != 1:
        raise ValueError(
            f"{site.path or 'the root'} is no eqx.nn.Linear of a stack of blocks, but a "
            f"{type(site.layer).__name__} of shape {site.struct.shape}: share_blocks "
            "shares the matrices of these alone. Leave it out with where=."
        )


def _is_changed(x: Any) -> bool:
    return isinstance(x, _ChangedLinear)


def _lend(block: PyTree, weights: dict[str, Array]) -> PyTree:
    """The block with its matrices."""
    leaves, treedef = named_leaves(block, _is_changed)
    new = [
        made_of(_ChangedLinear, weight=weights[path], change=x.change, bias=x.bias)
        if _is_changed(x)
        else x
        for path, x in leaves
    ]
    return treedef.unflatten(new)


def _plain(layer: _ChangedLinear) -> eqx.nn.Linear:
    weight, change = layer.weight, layer.change
    if change is not None:
        full = _wide(weight) + _wide(change.materialize())
        weight = full.astype(weight.dtype)
    return dense_linear(weight, layer.bias)
