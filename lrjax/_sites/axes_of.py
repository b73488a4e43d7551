"""Which axes of each parameter are a matrix, read off the program that uses it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from .._matrices import MatrixSpec, named_leaves


class AxesOf(NamedTuple):
    """The answer of :func:`axes_of`, a rule for ``axes=``.

    Attributes:
        specs: rows and columns by path, of the parameters that meet the inputs in a
            product, a convolution or a lookup.
        several: paths of those that do so in ways that do not agree.
    """

    specs: dict[str, MatrixSpec]
    several: tuple[str, ...] = ()

    def __call__(self, path: str, array: Any) -> MatrixSpec | None:
        """Rows and columns of the array at ``path``, or ``None`` where not known.

        Raises:
            ValueError: for an array that is used in several ways.
        """
        if path in self.several:
            raise ValueError(
                f"{path} of shape {tuple(array.shape)} meets the inputs in ways that do "
                "not agree on its inputs and outputs. Leave it out with where=, or tell by "
                "a rule of your own: axes=lambda path, array: lrjax.MatrixSpec(rows=…, "
                "cols=…)."
            )
        return self.specs.get(path)


def axes_of(f: Callable, params: PyTree, *inputs: PyTree) -> AxesOf:
    """Which axes of every parameter are inputs and outputs, as a rule for ``axes=``.

    The trees of Flax, Haiku and others hold arrays whose axes have no names: the kernel of
    a ``DenseGeneral``, of an einsum, of a convolution ``(height, width, in, out)``, of
    layers that are scanned. Here ``f(params, *inputs)`` is traced, and not run, and each
    array is followed to the product where it meets what depends on the inputs::

        y[b, o] = Σ_i x[b, i] W[b, i, o]      i: columns,  o: rows,  b: stacked

    The axis that a lookup goes along is one of columns, too. Nothing is guessed: an array
    that meets no input (a bias, the scale of a norm), or is mixed with others before, has
    no answer. One that is used twice, as a tied embedding, is answered by its first use,
    if the other has the same two sides.

    Args:
        f: the call of the model, ``f(params, *inputs)``, as in a loss.
        params: a tree of arrays, or of ``jax.ShapeDtypeStruct``.
        inputs: as in training, or only their shapes.

    Returns:
        A rule ``(path, array) -> lrjax.MatrixSpec or None`` for :func:`lrjax.adapt` and its
        neighbours; its ``specs`` can be looked at.

    Raises:
        ValueError: if no parameter meets the inputs in a product.

    Example:
        Attention as Flax stores it, with the heads as an axis of their own:

        >>> import jax, jax.numpy as jnp, lrjax
        >>> def project(params, x):
        ...     return jnp.einsum("td,dhk->thk", x, params["query"]["kernel"])
        >>> params = {"query": {"kernel": jnp.ones((32, 4, 8))}}
        >>> rule = lrjax.adapters.axes_of(project, params, jnp.ones((5, 32)))
        >>> rule.specs
        {'query.kernel': MatrixSpec(rows=(1, 2), cols=(0,), blocks=1)}
        >>> adapters = lrjax.adapt(
        ...     params, lrjax.LoRA(2), axes=rule, key=jax.random.key(0))
        >>> adapters["query.kernel"].pair.shape
        (32, 32)
    """
    arrays, static = eqx.partition((params, inputs), _has_shape)

    def call(arrays: PyTree) -> list:
        params, inputs = eqx.combine(arrays, static)
        return eqx.filter(jax.tree.leaves(f(params, *inputs)), eqx.is_array)

    program = jax.make_jaxpr(call)(arrays).jaxpr
    own = named_leaves(arrays[0])[0]
    views = [_View(path, x.shape, _each(range(len(x.shape)))) for path, x in own]
    found: list[tuple[str, MatrixSpec]] = []
    _follow(program, [*views, *[_INPUT] * (len(program.invars) - len(views))], found)
    if not found:
        raise ValueError(
            "axes_of found no parameter that meets the inputs in a product: f(params, "
            f"*inputs) has to use both. The parameters are {[path for path, _ in own][:8]}."
        )
    specs = dict(reversed(found))  # of each the first
    several = {path for path, spec in found if not _same_sides(spec, specs[path])}
    kept = {path: specs[path] for path, _ in own if path in specs and path not in several}
    return AxesOf(kept, tuple(sorted(several)))


class _View(NamedTuple):
    """A parameter, perhaps transposed or reshaped: the axes that make each dimension."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]


_INPUT = object()  # what depends on the inputs; None is what depends on neither
_Value = Any  # _View, _INPUT or None
_Found = list[tuple[str, MatrixSpec]]


def _has_shape(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _each(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((axis,) for axis in axes)


def _same_sides(one: MatrixSpec, other: MatrixSpec) -> bool:
    sides = lambda spec: {frozenset(spec.rows), frozenset(spec.cols)}
    return sides(one) == sides(other)


def _follow(program: Jaxpr, values: Sequence[_Value], found: _Found) -> list[_Value]:
    """What the outputs of a program are; notes where its parameters meet the inputs."""
    known = dict(zip(program.invars, values, strict=True))
    read = lambda x: None if isinstance(x, Literal) else known.get(x)
    for eqn in program.eqns:
        args = [read(x) for x in eqn.invars]
        known |= dict(zip(eqn.outvars, _results(eqn, args, found), strict=True))
    return [read(x) for x in program.outvars]


def _results(eqn: Any, args: list[_Value], found: _Found) -> list[_Value]:
    name, count = eqn.primitive.name, len(eqn.outvars)
    if not any(isinstance(arg, _View) for arg in args):
        return [_INPUT if any(arg is _INPUT for arg in args) else None] * count
    if name in _INNER:
        return _INNER[name](eqn, args, found)
    if name in _MEETINGS and any(arg is _INPUT for arg in args):
        found.extend(_MEETINGS[name](eqn, args))
    if any(arg is _INPUT for arg in args):
        inner = _called(eqn)
        return [_INPUT] * count if inner is None else _follow(inner, args, found)
    if (inner := _called(eqn)) is not None:
        return _follow(inner, args, found)
    if name in _SAME or name in _MOVES:
        view = max((a for a in args if isinstance(a, _View)), key=lambda a: len(a.axes))
        axes = _MOVES.get(name, lambda eqn, view: view.axes)(eqn, view)
        fits = lambda x: axes is not None and len(x.aval.shape) == len(axes)
        return [view._replace(axes=axes) if fits(x) else None for x in eqn.outvars]
    return [None] * count


# What happens to each number alone, moves an array, or takes out a part: the axes stay.
_CASTS = {"convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient"}
_PLACES = {"sharding_constraint", "mesh_cast", "reshard", "pcast", "pvary"}
_ARITHMETIC = {"mul", "add", "sub", "div", "neg", "abs", "sign", "max", "min", "select_n"}
_FUNCTIONS = {"exp", "log", "tanh", "logistic", "integer_pow", "square", "sqrt", "rsqrt"}
_ROUNDING = {"round", "clamp", "optimization_barrier"}
_PARTS = {"slice", "dynamic_slice", "split", "rev"}
_SAME = _CASTS | _PLACES | _ARITHMETIC | _FUNCTIONS | _ROUNDING | _PARTS


def _transposed(eqn: Any, view: _View) -> Any:
    return tuple(view.axes[i] for i in eqn.params["permutation"])


def _squeezed(eqn: Any, view: _View) -> Any:
    gone = eqn.params["dimensions"]
    return tuple(own for i, own in enumerate(view.axes) if i not in gone)


def _broadcast(eqn: Any, view: _View) -> Any:
    places = dict(zip(eqn.params["broadcast_dimensions"], view.axes, strict=True))
    return tuple(places.get(i, ()) for i in range(len(eqn.params["shape"])))


def _indexed(eqn: Any, view: _View) -> Any:
    """What a gather at places that depend on no input leaves."""
    numbers = eqn.params["dimension_numbers"]
    return tuple(
        own for i, own in enumerate(view.axes) if i not in numbers.collapsed_slice_dims
    )


def _reshaped(eqn: Any, view: _View) -> Any:
    """Dimensions joined, or taken apart where they were joined before."""
    atoms = []
    for size, own in zip(eqn.invars[0].aval.shape, view.axes, strict=True):
        sizes = [view.shape[axis] for axis in own]
        whole = math.prod(sizes) == size
        atoms += zip(_each(own), sizes, strict=True) if whole else [(own, size)]
    groups = []
    for size in eqn.params["new_sizes"]:
        group, reached = (), 1
        while reached < size and atoms:
            own, more = atoms.pop(0)
            group, reached = group + own, reached * more
        if reached != size:
            return None
        groups.append(group)
    return tuple(groups)


_MOVES: dict[str, Callable[[Any, _View], Any]] = {
    "transpose": _transposed,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "gather": _indexed,
}


def _spec(view: _View, cols: Sequence[int], batch: Sequence[int] = ()) -> _Found:
    """The columns are the axes of these dimensions, the rows all others but the batch."""
    of = lambda dims: tuple(axis for i in dims for axis in view.axes[i])
    rest = [i for i in range(len(view.axes)) if i not in {*cols, *batch}]
    rows, columns = of(rest), of(cols)
    return [(view.path, MatrixSpec(rows, columns))] if rows and columns else []


def _product(eqn: Any, args: list[_Value]) -> _Found:
    contracted, batches = eqn.params["dimension_numbers"]
    met = zip(args, contracted, batches, strict=True)
    return [
        pair
        for view, cols, batch in met
        if isinstance(view, _View)
        for pair in _spec(view, cols, batch)
    ]


def _convolution(eqn: Any, args: list[_Value]) -> _Found:
    kernel = args[1]
    if not isinstance(kernel, _View):
        return []
    _, *cols = eqn.params["dimension_numbers"].rhs_spec
    return _spec(kernel, cols)


def _lookup(eqn: Any, args: list[_Value]) -> _Found:
    table, sizes = args[0], eqn.params["slice_sizes"]
    if not isinstance(table, _View):
        return []
    return _spec(table, [i for i, size in enumerate(sizes) if size == 1])


_MEETINGS: dict[str, Callable[[Any, list[_Value]], _Found]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _lookup,
}


def _called(eqn: Any) -> Jaxpr | None:
    """The program that takes the operands one by one: of jit, checkpoint, custom_vjp."""
    for inner in eqn.params.values():
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(eqn.invars):
            same = len(inner.outvars) == len(eqn.outvars)
            return inner if same else None
    return None


def _scanned(eqn: Any, args: list[_Value], found: _Found) -> list[_Value]:
    """The axis that is scanned stacks matrices; what is carried depends on the inputs."""
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    one = lambda x: x._replace(axes=x.axes[1:]) if isinstance(x, _View) else x
    values = [*args[:consts], *[_INPUT] * carried, *map(one, args[consts + carried :])]
    _follow(eqn.params["jaxpr"].jaxpr, values, found)
    return [_INPUT] * len(eqn.outvars)


def _repeated(eqn: Any, args: list[_Value], found: _Found) -> list[_Value]:
    skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    values = [*args[skipped : skipped + consts], *[_INPUT] * len(eqn.outvars)]
    _follow(eqn.params["body_jaxpr"].jaxpr, values, found)
    return [_INPUT] * len(eqn.outvars)


def _chosen(eqn: Any, args: list[_Value], found: _Found) -> list[_Value]:
    for branch in eqn.params["branches"]:
        _follow(branch.jaxpr, args[1:], found)
    return [_INPUT] * len(eqn.outvars)


_INNER: dict[str, Callable[[Any, list[_Value], _Found], list[_Value]]] = {
    "scan": _scanned,
    "while": _repeated,
    "cond": _chosen,
}
