from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..._matrices import check_real, path_name
from ..._sharding import einsum
from ...linalg import outer, working_dtype
from .._changes import over_stack
from .aggregation_rules import CoordinateRule, GeometricMedian, GramRule


Rule = GramRule | CoordinateRule


def aggregate_gradients(
    gradients: PyTree,
    rule: Rule = GeometricMedian(),  # noqa: B008
    *,
    axis_name: Hashable | None = None,
) -> PyTree:
    """One gradient of those of several workers, some of whom may send anything.

    Use it where the mean would stand, in front of the optimizer. All arrays of a tree are
    one vector ``g_k``. Rules of inner products, :class:`GeometricMedian`,
    :class:`FlagMean`, :class:`Krum` and :class:`Mean`, weigh the workers, ``Σ_k w_k g_k``
    with weights from ``⟨g_i, g_j⟩ (p, p)``; :class:`TrimmedMean` takes each coordinate by
    itself. A worker whose gradient, or the square of its norm, is not finite counts as if
    it had sent zeros.

    Without ``axis_name`` the workers are a leading axis on all arrays, as ``jax.vmap`` of a
    gradient gives them. With it they are the members of that axis, of ``jax.shard_map`` or
    ``jax.vmap``, and each hands over its own tree. Then no device ever holds the gradients
    of all: each gets its share of the coordinates of all workers, as many numbers as one
    gradient has, in an all-to-all; the inner products are summed over the shares, and the
    result is one sum over the workers, as that of the mean. Arrays have to be whole on
    each worker.

    Args:
        gradients: a tree of arrays, with a leading axis of the workers or within their
            axis.
        rule: how they become one.
        axis_name: the name of the axis of the workers.

    Returns:
        A tree like that of one worker, in its dtypes; the same on all of them.

    Raises:
        TypeError: for complex gradients, or a rule that is none.
        ValueError: for leading axes of different lengths, or more outliers than the rule
            bears.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
        >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [-1e6, 1e6]])
        >>> grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(jnp.zeros(2), x)
        >>> print(lrjax.merging.aggregate_gradients(grads).round(1))
        [-2.  0.]
        >>> def worker(x):
        ...     g = jax.grad(loss)(jnp.zeros(2), x)
        ...     return lrjax.merging.aggregate_gradients(g, axis_name="workers")
        >>> print(jax.vmap(worker, axis_name="workers")(x)[0].round(1))
        [-2.  0.]

    Reference:
        H. Almasi, H. Mishra, B. Vamanan, S. N. Ravi, "Flag aggregator: scalable distributed
        training under failures and augmented losses using convex optimization" (2023),
        arXiv 2302.05865; the rules have theirs.
    """
    if not isinstance(rule, Rule):
        raise TypeError(
            "aggregate_gradients needs a rule such as lrjax.merging.GeometricMedian() or "
            f"lrjax.merging.TrimmedMean(), got {rule!r}."
        )
    check_real("aggregate_gradients", gradients)
    leaves, treedef = jax.tree.flatten(gradients)
    if not leaves:
        return gradients
    if axis_name is None:
        workers = _workers(gradients)
        rule.check(workers)
        found = _of_stacks(leaves, rule)
    else:
        rule.check(lax.axis_size(axis_name))
        found = _within(leaves, rule, axis_name)
    return treedef.unflatten(
        [y.astype(x.dtype) for x, y in zip(leaves, found, strict=True)]
    )


def _workers(gradients: PyTree) -> int:
    shapes = {
        path_name(path) or "the root": jnp.shape(x)
        for path, x in jtu.tree_flatten_with_path(gradients)[0]
    }
    counts = {shape[:1] for shape in shapes.values()}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            "aggregate_gradients needs a leading axis of the workers, of one length on "
            f"all arrays; got {shapes}. Within an axis of shard_map or vmap, give its "
            "axis_name."
        )
    return counts.pop()[0]


def _wide(leaves: list[Any]) -> list[Array]:
    dtype = working_dtype(jnp.result_type(*leaves))
    return [jnp.asarray(x, dtype) for x in leaves]


def _of_stacks(leaves: list[Any], rule: Rule) -> list[Array]:
    """The workers on a leading axis."""
    wide = _wide(leaves)
    squares = [jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in wide]
    finite = jnp.isfinite(sum(squares[1:], squares[0]))
    wide = [jnp.where(over_stack(finite, x), x, 0) for x in wide]
    if isinstance(rule, CoordinateRule):
        return [rule.reduce(x) for x in wide]
    products = [_products(x) for x in wide]
    weights = rule.weights(sum(products[1:], products[0]))
    return [einsum("p,p...->...", weights, x) for x in wide]


def _products(x: Array) -> Float[Array, "p p"]:
    axes = "abcdefghijklmno"[: x.ndim - 1]
    return einsum(f"y{axes},z{axes}->yz", x, x)


def _within(leaves: list[Any], rule: Rule, axis_name: Hashable) -> list[Array]:
    """The workers on an axis of the program, each with its own gradient."""
    wide = _wide(leaves)
    finite = jnp.isfinite(sum(jnp.sum(x**2) for x in wide))
    wide = [jnp.where(finite, x, 0) for x in wide]
    shares = [_share(x, axis_name) for x in wide]
    own = lax.axis_index(axis_name)
    if isinstance(rule, CoordinateRule):
        parts = [jnp.zeros_like(x).at[own].set(rule.reduce(x)) for x in shares]
        whole = lax.psum(parts, axis_name)
        return [
            x.ravel()[: y.size].reshape(y.shape) for x, y in zip(whole, wide, strict=True)
        ]
    gram = lax.psum(sum(outer(x, x) for x in shares), axis_name)
    weight = rule.weights(gram)[own]
    return lax.psum([weight * x for x in wide], axis_name)


def _share(x: Array, axis_name: Hashable) -> Float[Array, "p q"]:
    """This worker's share of the coordinates, of all workers."""
    workers = lax.axis_size(axis_name)
    each = -(-x.size // workers)
    flat = jnp.pad(x.ravel(), (0, workers * each - x.size)).reshape(workers, each)
    return lax.all_to_all(flat, axis_name, 0, 0)
