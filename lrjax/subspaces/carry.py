from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from .._sharding import einsum
from .bases.quantized import Codes, decode, encode_like


class Moments(NamedTuple):
    """The moments that an inner transform keeps of one leaf.

    Attributes:
        first: running mean or sum of the projected gradients, ``(*b, r, n)`` or
            ``(*b, m, r)`` by the side of the basis, or None.
        second: running mean of their squares, or None.
        count: how many gradients they hold, or None where the state does not count.
    """

    first: Float[Array, "*b m2 n2"] | None
    second: Float[Array, "*b m2 n2"] | None
    count: Int[Array, ""] | None


class Change(NamedTuple):
    """A change of basis, as a carry sees it.

    Attributes:
        overlap: ``C = P_newᵀ P_old (*b, r, r)``.
        projected: the present gradient in the new basis, shaped like the moments.
        rows: whether the basis acts on the rows, so that ``m ← C m``; else ``m ← m Cᵀ``.
    """

    overlap: Float[Array, "*b r r"]
    projected: Float[Array, "*b m2 n2"]
    rows: bool

    def turn(self, x: Array, *, squared: bool = False) -> Array:
        """Move coordinates by ``C``, or by the elementwise square of ``C``."""
        c = self.overlap.astype(x.dtype)
        c = c**2 if squared else c
        if self.rows:
            return einsum("...rs,...sq->...rq", c, x)
        return einsum("...qs,...rs->...qr", x, c)


class Carry(NamedTuple):
    """What becomes of the inner moments when the basis changes.

    Attributes:
        apply: ``(Moments, Change) -> Moments``, or None to leave them as they are.
        align: turn the new basis within its span towards the old one first.
    """

    apply: Callable[[Moments, Change], Moments] | None
    align: bool = False


def keep() -> Carry:
    """Leave the moments as they are, whatever happens to the basis.

    They then refer to coordinates that no longer exist: cheap, the choice of most
    published methods, and the reason why their basis may change only rarely.

    Returns:
        The carry.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), carry=sub.keep()
        ... )
    """
    return Carry(None)


def align() -> Carry:
    """Keep the moments, and choose the new basis of the same span nearest to the old.

    ``P_new ← P_new · polar(P_newᵀ P_old)``: flipped signs and swapped columns vanish, so
    that the moments stay meaningful for elementwise inner transforms.

    Returns:
        The carry.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.svd(4), carry=sub.align()
        ... )
    """
    return Carry(None, align=True)


def rotate() -> Carry:
    """Move the first moment into the new basis, ``m ← C m``; keep the second.

    Exact for the part of the moment that the new subspace can hold.

    Returns:
        The carry.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.trace(0.9), sub.random_orthonormal(4), carry=sub.rotate()
        ... )
    """

    def apply(old, change):
        return old if old.first is None else old._replace(first=change.turn(old.first))

    return Carry(apply)


def rotate_variance(b1: ArrayLike = 0.9, b2: ArrayLike = 0.999) -> Carry:
    """Move both moments into the new basis, the second by its statistics.

    With the bias-corrected ``m̂ = m/(1−b1ᵗ)``, ``v̂ = v/(1−b2ᵗ)`` and squares elementwise:
    ``m ← C m`` and ``v ← (1−b2ᵗ) |C²(v̂ − m̂²) + (C m̂)²|``: the variance of each new
    coordinate if the old coordinates were uncorrelated, plus its squared mean.

    Args:
        b1: decay of the inner first moment.
        b2: decay of the inner second moment.

    Returns:
        The carry.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.power(4), carry=sub.rotate_variance()
        ... )

    Reference:
        T. Robert, M. Safaryan, I.-V. Modoranu, D. Alistarh, "LDAdam" (2024), arXiv
        2410.16103.
    """

    def apply(old, change):
        first = None if old.first is None else change.turn(old.first)
        if old.second is None:
            return old._replace(first=first)
        seen1, seen2 = _filled(old.count, b1), _filled(old.count, b2)
        mean = 0.0 if old.first is None else old.first / seen1
        new_mean = 0.0 if first is None else first / seen1
        spread = old.second / seen2 - mean**2
        second = jnp.abs(change.turn(spread, squared=True) + new_mean**2)
        return old._replace(first=first, second=second * seen2)

    return Carry(apply)


def _filled(count: Array | None, decay: ArrayLike) -> ArrayLike:
    """``1 − decayᵗ``, the share of an average from zero that holds data."""
    if count is None:
        return 1.0
    # Nothing is known before the first step, and nothing is there to be divided.
    return jnp.where(count > 0, 1 - decay**count, 1)


def seeded_reset(b1: ArrayLike = 0.9, b2: ArrayLike = 0.999) -> Carry:
    """Forget the moments, and start as if all gradients had been like the present one.

    ``m ← (1−b1ᵗ) R``, ``v ← (1−b2ᵗ) R²``, so that the bias-corrected moments are ``R``
    and ``R²``. A reset to zero under Adam's running step count makes the next updates
    several times too large; this one starts at the right size. Moments whose state
    does not count its steps are set to zero.

    Args:
        b1: decay of the inner first moment.
        b2: decay of the inner second moment.

    Returns:
        The carry.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.scale_by_adam(), sub.rows(4), carry=sub.seeded_reset()
        ... )
    """

    def apply(old, change):
        fill = lambda decay: 0.0 if old.count is None else 1 - decay**old.count
        first = fill(b1) * change.projected
        second = fill(b2) * change.projected**2
        return Moments(
            None if old.first is None else first,
            None if old.second is None else second,
            old.count,
        )

    return Carry(apply)


def reset() -> Carry:
    """Set the moments to zero.

    Right for inner transforms without bias correction; under Adam prefer
    :func:`seeded_reset`.

    Returns:
        The carry.

    Example:
        >>> import lrjax, optax
        >>> sub = lrjax.subspaces
        >>> tx = lrjax.project_updates(
        ...     optax.trace(0.9), sub.svd(4), carry=sub.reset()
        ... )
    """
    zeros = lambda x: jax.tree.map(jnp.zeros_like, x)
    return Carry(
        lambda old, change: Moments(zeros(old.first), zeros(old.second), old.count)
    )


class Roles(NamedTuple):
    """Which fields of an optax state are which moments."""

    first: str | None = None
    second: str | None = None
    count: str | None = None


_ROLES: dict[type, Roles] = {
    optax.ScaleByAdamState: Roles("mu", "nu", "count"),
    optax.ScaleByBeliefState: Roles("mu", "nu", "count"),
    optax.ScaleByLionState: Roles("mu", None, "count"),
    optax.ScaleByRmsState: Roles(None, "nu"),
    optax.TraceState: Roles("trace"),
    optax.EmaState: Roles("ema", None, "count"),
}


def register_roles(
    state_type: type,
    *,
    first: str | None = None,
    second: str | None = None,
    count: str | None = None,
) -> None:
    """Tell the carries which fields of an inner state hold moments.

    Args:
        state_type: the NamedTuple class of the state.
        first: field with a tree of first moments (linear in the gradients).
        second: field with a tree of second moments.
        count: field with the number of steps, if moments are bias-corrected by it.

    Example:
        >>> from typing import NamedTuple
        >>> import jax, lrjax
        >>> class MyState(NamedTuple):
        ...     average: object
        >>> lrjax.subspaces.register_roles(MyState, first="average")
    """
    _ROLES[state_type] = Roles(first, second, count)


def _with_moments(state: PyTree) -> Iterator[Any]:
    """The states with known moments inside an inner state, in tree order."""
    if type(state) in _ROLES:
        yield state
    elif isinstance(state, dict):
        for key in sorted(state):
            yield from _with_moments(state[key])
    elif isinstance(state, tuple | list):
        for part in state:
            yield from _with_moments(part)


def read_moments(state: PyTree, treedef: Any) -> list[list[Moments]]:
    """The moments of every leaf: one entry for each state that keeps some of it.

    Moments that are stored as codes are decoded, and encoded again when written.
    """
    out: list[list[Moments]] = [[] for _ in range(treedef.num_leaves)]

    def column(part, name):
        if name is None:
            return [None] * treedef.num_leaves
        leaves = treedef.flatten_up_to(getattr(part, name))
        return [decode(x) if isinstance(x, Codes) else x for x in leaves]

    for part in _with_moments(state):
        roles = _ROLES[type(part)]
        count = None if roles.count is None else getattr(part, roles.count)
        pairs = zip(column(part, roles.first), column(part, roles.second), strict=True)
        for leaf, (first, second) in zip(out, pairs, strict=True):
            first, second = (x if eqx.is_array(x) else None for x in (first, second))
            leaf.append(Moments(first, second, count))
    return out


def write_moments(state: PyTree, treedef: Any, moments: list[list[Moments]]) -> PyTree:
    """Undo :func:`read_moments`: the same state with other moments."""
    if not moments:
        return state
    position = iter(range(len(moments[0])))

    def put(field, values):
        old = treedef.flatten_up_to(field)
        return treedef.unflatten(map(restore, old, values))

    def restore(old, new):
        if new is None:
            return old
        return encode_like(new, old) if isinstance(old, Codes) else new

    def write(part):
        roles, k = _ROLES[type(part)], next(position)
        for name, role in ((roles.first, 0), (roles.second, 1)):
            if name is not None:
                values = [leaf[k][role] for leaf in moments]
                part = part._replace(**{name: put(getattr(part, name), values)})
        return part

    return _map_states(write, state)


def _map_states(f: Callable[[Any], Any], state: PyTree) -> PyTree:
    """Replace the states with known moments inside an inner state, in tree order."""
    visit = lambda part: _map_states(f, part)
    if type(state) in _ROLES:
        return f(state)
    if isinstance(state, dict):
        new = {key: visit(state[key]) for key in sorted(state)}
        return type(state)({key: new[key] for key in state})
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*map(visit, state))
    if isinstance(state, tuple | list):
        return type(state)(map(visit, state))
    return state


def map_moments(f: Callable[[Any, bool], Any], state: PyTree) -> PyTree:
    """Apply ``f(leaf, signed)`` to all moments of known role inside a state.

    First moments are signed; leaves are arrays, or the codes of some.
    """

    def apply(part):
        roles = _ROLES[type(part)]
        for name, signed in ((roles.first, True), (roles.second, False)):
            if name is not None:
                new = jax.tree.map(
                    lambda leaf, signed=signed: f(leaf, signed),
                    getattr(part, name),
                    is_leaf=lambda leaf: isinstance(leaf, Codes),
                )
                part = part._replace(**{name: new})
        return part

    return _map_states(apply, state)


def has_moments(state: PyTree) -> bool:
    """Whether a state holds moments of known role."""
    roles = (_ROLES[type(part)] for part in _with_moments(state))
    return any(role.first is not None or role.second is not None for role in roles)


def check_roles(state: PyTree) -> None:
    """Refuse an inner state that holds matrices in fields of unknown role."""

    def visit(part, name):
        if type(part) in _ROLES:
            return
        if isinstance(part, dict):
            for key in part:
                visit(part[key], f"{name}[{key!r}]")
        elif isinstance(part, tuple) and (fields := getattr(part, "_fields", ())):
            for field in fields:
                visit(getattr(part, field), f"{type(part).__name__}.{field}")
        elif isinstance(part, tuple | list):
            for k, x in enumerate(part):
                visit(x, f"{name}[{k}]")
        elif any(getattr(x, "ndim", 0) >= 2 for x in jax.tree.leaves(part)):
            raise ValueError(
                f"The carry does not know what {name} of the inner transform's state is. "
                "Say so with lrjax.subspaces.register_roles(type, first=…, second=…), or "
                "use carry=lrjax.subspaces.keep()."
            )

    visit(state, "the inner state")
