"""The moments inside the states of optax transforms: which fields they are, and access."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ._codes import dequantize, is_quantized, join_codes, quantize_like, split_codes


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


class MomentFields(NamedTuple):
    """Which fields of an optax state are moments, and which counts the steps.

    Attributes:
        first: fields with trees of first moments, linear in the gradients.
        second: fields with trees of second moments; the k-th belongs to the k-th first.
        count: the field with the number of steps, if moments are bias-corrected by it.
    """

    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    count: str | None = None

    def pairs(self) -> Iterator[tuple[str | None, str | None]]:
        """The fields that make one :class:`Moments` each."""
        for k in range(max(len(self.first), len(self.second))):
            pick = lambda names, k=k: names[k] if k < len(names) else None
            yield pick(self.first), pick(self.second)


def _state_type(tx: optax.GradientTransformation) -> type:
    """The class of a state that optax does not export."""
    return type(jax.eval_shape(tx.init, jax.ShapeDtypeStruct((), jnp.float32)))


_ADAM = MomentFields(("mu",), ("nu",), "count")
_FIELDS: dict[type, MomentFields] = {
    optax.EmaState: MomentFields(("ema",), (), "count"),
    optax.FactoredState: MomentFields((), ("v",), "count"),
    optax.ScaleByAdaDeltaState: MomentFields((), ("e_g", "e_x")),
    optax.ScaleByAdamState: _ADAM,
    optax.ScaleByAdanState: MomentFields(("m", "v", "g"), ("n",), "t"),
    optax.ScaleByAmsgradState: MomentFields(("mu",), ("nu", "nu_max"), "count"),
    optax.ScaleByBeliefState: _ADAM,
    optax.ScaleByLionState: MomentFields(("mu",), (), "count"),
    optax.ScaleByNovogradState: _ADAM,
    optax.ScaleByRStdDevState: MomentFields(("mu",), ("nu",)),
    optax.ScaleByRmsState: MomentFields((), ("nu",)),
    optax.ScaleByRssState: MomentFields((), ("sum_of_squares",)),
    optax.TraceState: MomentFields(("trace",)),
    optax.contrib.DAdaptAdamWState: MomentFields(
        ("exp_avg", "grad_sum"), ("exp_avg_sq",), "count"
    ),
    optax.contrib.MomoAdamState: MomentFields(("exp_avg",), ("exp_avg_sq",), "count"),
    optax.contrib.MomoState: MomentFields(("exp_avg",), (), "count"),
    optax.contrib.MuonState: MomentFields(("mu",), (), "count"),
    optax.contrib.ProdigyState: MomentFields(
        ("exp_avg", "grad_sum"), ("exp_avg_sq",), "count"
    ),
    optax.contrib.ScaleByAdemamixState: MomentFields(("m1", "m2"), ("nu",), "count"),
    optax.contrib.ScaleBySimplifiedAdEMAMixState: MomentFields(("m",), ("n",), "t"),
    optax.contrib.SophiaState: _ADAM,
    _state_type(optax.scale_by_rms(bias_correction=True)): MomentFields(
        (), ("nu",), "count"
    ),
    _state_type(optax.scale_by_stddev(bias_correction=True)): _ADAM,
}


def register_moments(
    state_type: type,
    *,
    first: str | tuple[str, ...] = (),
    second: str | tuple[str, ...] = (),
    count: str | None = None,
) -> None:
    """Tell which fields of an optax state are moments, for all who move or store them.

    Args:
        state_type: the NamedTuple class of the state.
        first: field, or fields, with a tree of first moments (linear in the gradients).
        second: field, or fields, with a tree of second moments.
        count: field with the number of steps, if moments are bias-corrected by it.

    Example:
        >>> from typing import NamedTuple
        >>> import jax, lrjax
        >>> class MyState(NamedTuple):
        ...     average: object
        >>> lrjax.subspaces.register_moments(MyState, first="average")
    """
    names = lambda x: (x,) if isinstance(x, str) else tuple(x)
    _FIELDS[state_type] = MomentFields(names(first), names(second), count)


def _map_states(f: Callable[[Any, MomentFields], Any], state: PyTree) -> PyTree:
    """Replace the states with known moments inside a state, in tree order."""
    visit = lambda part: _map_states(f, part)
    if type(state) in _FIELDS:
        return f(state, _FIELDS[type(state)])
    if isinstance(state, dict):
        new = {key: visit(state[key]) for key in sorted(state)}
        return type(state)({key: new[key] for key in state})
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*map(visit, state))
    if isinstance(state, tuple | list):
        return type(state)(map(visit, state))
    return state


def _found(state: PyTree) -> list[tuple[Any, MomentFields]]:
    """The states with known moments inside a state, in tree order."""
    found = []
    _map_states(lambda part, fields: found.append((part, fields)), state)
    return found


def read_moments(state: PyTree, treedef: Any) -> list[list[Moments]]:
    """The moments of every leaf: one entry for each pair of fields that keeps some of it.

    Moments stored as codes are decoded, and encoded again when written. What has fewer
    than two axes is one number a layer, which no change of basis moves.
    """
    out: list[list[Moments]] = [[] for _ in range(treedef.num_leaves)]

    def column(part, name):
        if name is None:
            return [None] * treedef.num_leaves
        return map(_decoded, treedef.flatten_up_to(join_codes(getattr(part, name))))

    for part, fields in _found(state):
        count = None if fields.count is None else getattr(part, fields.count)
        for first, second in fields.pairs():
            both = zip(column(part, first), column(part, second), strict=True)
            for leaf, moments in zip(out, both, strict=True):
                leaf.append(Moments(*moments, count))
    return out


def _decoded(x: Any) -> Array | None:
    x = dequantize(x) if is_quantized(x) else x
    return x if eqx.is_array(x) and x.ndim >= 2 else None


def write_moments(state: PyTree, treedef: Any, moments: list[list[Moments]]) -> PyTree:
    """Undo :func:`read_moments`: the same state with other moments."""
    position = iter(range(len(moments[0]) if moments else 0))

    def put(part, name, values):
        stored = getattr(part, name)
        old = treedef.flatten_up_to(join_codes(stored))
        new = treedef.unflatten(map(_stored_as, values, old))
        return part._replace(
            **{name: split_codes(new, type(stored)) if is_quantized(stored) else new}
        )

    def write(part, fields):
        for first, second in fields.pairs():
            k = next(position)
            if first is not None:
                part = put(part, first, [leaf[k].first for leaf in moments])
            if second is not None:
                part = put(part, second, [leaf[k].second for leaf in moments])
        return part

    return _map_states(write, state) if moments else state


def _stored_as(new: Array | None, old: Any) -> Any:
    if new is None:
        return old
    return quantize_like(new, old) if is_quantized(old) else new


def map_moments(f: Callable[[PyTree, bool], PyTree], state: PyTree) -> PyTree:
    """Apply ``f(tree, signed)`` to all fields with known moments inside a state.

    First moments are signed.
    """

    def apply(part, fields):
        for signed, names in ((True, fields.first), (False, fields.second)):
            for name in names:
                part = part._replace(**{name: f(getattr(part, name), signed)})
        return part

    return _map_states(apply, state)


def has_moments(state: PyTree) -> bool:
    """Whether a state holds moments in known fields."""
    return any(fields.first or fields.second for _, fields in _found(state))


def state_names(state: PyTree) -> str:
    """The classes of the states inside a state, for errors."""
    names: list[str] = []

    def visit(part):
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            names.append(type(part).__name__)
        if isinstance(part, dict):
            part = part.values()
        elif not isinstance(part, tuple | list):
            return
        for x in part:
            visit(x)

    visit(state)
    return ", ".join(dict.fromkeys(names)) or type(state).__name__


def check_moments_known(state: PyTree) -> None:
    """Refuse an inner state that holds matrices in fields that nothing is known of."""

    def visit(part, name):
        if type(part) in _FIELDS:
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
                f"The moment transport does not know what {name} of the inner transform's "
                "state is. Say so with lrjax.subspaces.register_moments(type, first=…, "
                "second=…), or use carry=lrjax.subspaces.Keep()."
            )

    visit(state, "the inner state")
