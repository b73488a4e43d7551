from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, ArrayLike, PyTree

from ...._arguments import checks_trees
from ...._matrices import check_real, path_name
from ...._tree import Side, check_has_nodes, check_params, like, map_nodes, sides
from ....linalg import cross, gram, times
from ....lowrank import LowRank, is_low_rank
from ..._checks import check_non_negative


class AddAnchorState(NamedTuple):
    """The state of :func:`add_anchor`, to be replaced when a task ends.

    Attributes:
        anchor: where the parameters are pulled to.
        importance: how hard each of them, or None for all alike.
    """

    anchor: PyTree
    importance: PyTree


@checks_trees
def add_anchor(
    weight: ArrayLike,
    anchor: PyTree | None = None,
    importance: PyTree | None = None,
    *,
    of: Literal["factors", "product"] = "factors",
) -> optax.GradientTransformationExtraArgs:
    """Weight decay toward a point other than zero, each number by its importance.

    The gradient of ``½ weight Σ F (θ − θ₀)²`` is added::

        G ← G + weight · F (θ − θ₀)

    Without importances ``F`` is one everywhere. Fine-tuning then stays near its start
    (L2-SP). With the diagonal Fisher information of an earlier task,
    :func:`lrjax.metrics.diagonal_fisher` at θ₀, it is elastic weight consolidation (EWC).

    It stands in a chain where ``optax.add_decayed_weights`` does, which it is for
    ``θ₀ = 0``: before the preconditioner the pull is part of the loss (coupled); between
    it and the learning rate it acts on the parameters directly (decoupled, as AdamW).

    The pull of factors is one of their numbers, and so depends on how a product is split.
    With ``of="product"`` that of a LowRank node ``left rightᵀ`` is the gradient of
    ``½ weight ‖left rightᵀ − left₀ right₀ᵀ‖²``, which does not::

        G_l ← G_l + weight · (left (rightᵀright) − left₀ (right₀ᵀright))
        G_r ← G_r + weight · (right (leftᵀleft) − right₀ (left₀ᵀleft))

    in ``O((m + n) r²)``, the product never formed; the anchor may be of another width. Of
    other leaves it is the pull of their numbers. Of a pair with a frozen factor, which
    ``update(…, frozen=frozen)`` reads, that factor is the anchor's as well.

    The anchor and the importances are part of the state. After a task,
    ``optax.tree.set(state, anchor=…, importance=…)`` puts new ones in their place. Online
    EWC keeps one anchor and a running sum: ``anchor`` the present parameters,
    ``importance`` γ times the old one plus that of the task; give zeros to begin with.

    Args:
        weight: non-negative; a number or an array.
        anchor: θ₀, a tree like the parameters; by default those that ``init`` sees.
        importance: F, a tree like the parameters, or None for ones.
        of: what is anchored at LowRank nodes.

    Returns:
        An optax transform; ``update`` needs ``params``.

    Raises:
        TypeError: in ``init``, for complex parameters.
        ValueError: at construction, for a negative weight, another ``of``, or importances
            of a product; in ``init``, if the anchor or the importances do not fit the
            parameters, or there is no LowRank node whose product could be anchored; in
            ``update``, without ``params``.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> start = jnp.array([1.0, 2.0])
        >>> tx = lrjax.add_anchor(0.5, start, importance=jnp.array([0.0, 4.0]))
        >>> zero = jnp.zeros(2)
        >>> print(tx.update(zero, tx.init(start), start + 1)[0])
        [0. 2.]

    Reference:
        J. Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks"
        (2017), arXiv 1612.00796; a running sum: J. Schwarz et al., "Progress & compress: a
        scalable framework for continual learning" (2018), arXiv 1805.06370; without
        importances: X. Li, Y. Grandvalet, F. Davoine, "Explicit inductive bias for transfer
        learning with convolutional networks" (2018), arXiv 1802.01483. Special cases:
        ``optax.add_decayed_weights`` and :func:`lrjax.add_frobenius_decay`, with zeros as
        anchor.
    """
    check_non_negative("add_anchor", "weight", weight)
    if of not in ("factors", "product"):
        raise ValueError(f"add_anchor takes of='factors' or of='product', got {of!r}.")
    if of == "product" and importance is not None:
        raise ValueError(
            "add_anchor(of='product') takes no importances: they belong to the numbers of "
            "the factors, and of the product there would be m × n."
        )

    def init(params):
        check_real("add_anchor", params)
        if of == "product":
            check_has_nodes("add_anchor(of='product')", params)
        own = lambda name, tree: _matched(name, tree, params, of == "product")
        return AddAnchorState(
            params if anchor is None else own("anchor", anchor),
            None if importance is None else own("importance", importance),
        )

    def pull_number(g: Array, x: Array, x0: Array, f: ArrayLike = 1.0) -> Array:
        wide = jnp.promote_types(g.dtype, jnp.float32)
        away = x.astype(wide) - x0.astype(wide)
        return (g + jnp.asarray(weight, wide) * f * away).astype(g.dtype)

    def pull_product(g: LowRank, x: LowRank, x0: LowRank) -> LowRank:
        both = zip(sides(g, x), sides(g, x0), strict=True)
        return like(g, *(own.gradient + weight * _slope(own, to) for own, to in both))

    def update(updates, state, params=None, *, frozen: Any = None, **extra):
        del extra
        check_params("add_anchor", params)
        if of == "factors":
            rest = () if state.importance is None else (state.importance,)
            new = jax.tree.map(pull_number, updates, params, state.anchor, *rest)
            return new, state
        others = lambda g, *x: g if is_low_rank(g) else pull_number(g, *x)
        trees = (updates, params, state.anchor)
        updates = jax.tree.map(others, *trees, is_leaf=is_low_rank)
        pulled = map_nodes(pull_product, updates, params, state.anchor, frozen=frozen)
        return pulled, state

    return optax.GradientTransformationExtraArgs(init, update)


def _slope(own: Side, anchor: Side) -> Array:
    """``(own partnerᵀ − own₀ partner₀ᵀ) partner`` of one factor."""
    among = gram(own.partner)
    wide = lambda x: x.astype(among.dtype)
    between = cross(wide(anchor.partner), wide(own.partner))
    return times(wide(own.factor), among) - times(wide(anchor.factor), between)


def _matched(name: str, tree: PyTree, params: PyTree, any_width: bool) -> Any:
    """The leaves of a tree at the paths of the parameters, where others may be masked."""
    if not jax.tree.leaves(params):  # a placeholder of optax, or nothing to anchor
        return params
    given = dict(jtu.tree_flatten_with_path(tree)[0])

    def one(path, x, has_columns):
        found = given.get(path)
        fixed = slice(None, -1) if has_columns else slice(None)
        if found is None or jnp.shape(found)[fixed] != jnp.shape(x)[fixed]:
            got = "nothing" if found is None else f"an array of shape {jnp.shape(found)}"
            raise ValueError(
                f"add_anchor needs an {name} like the parameters, but for "
                f"{path_name(path) or 'the root'} of shape {jnp.shape(x)} it has {got}. "
                "Keep what is not to be anchored out with optax.masked."
            )
        return jnp.asarray(found)

    def free(x):
        """Whether the last axis of a leaf may be of any length."""
        return jax.tree.map(lambda _: any_width and is_low_rank(x), x)

    return jtu.tree_map_with_path(
        one, params, jax.tree.map(free, params, is_leaf=is_low_rank)
    )
