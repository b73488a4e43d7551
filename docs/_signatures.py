"""Signatures as they are written in the source: ``ArrayLike``, not the union behind it."""

import ast
import inspect
import textwrap

from sphinx.util.inspect import stringify_signature


class Source:
    """An expression that shows as it is written."""

    def __init__(self, node: ast.expr):
        self.text = ast.unparse(node)

    def __repr__(self):
        return self.text


def as_written(app, what, name, obj, options, signature, returns):
    """Handler of ``autodoc-process-signature``."""
    if signature is None or not (inspect.isclass(obj) or inspect.isfunction(obj)):
        return None
    written, result = _of_class(obj) if inspect.isclass(obj) else _of_function(obj)
    shown = inspect.signature(obj)
    parameters = [
        parameter.replace(**written.get(name, {}))
        for name, parameter in shown.parameters.items()
        if name != "self"
    ]
    shown = shown.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return stringify_signature(shown), result


def _of_function(function) -> tuple[dict, str | None]:
    node = _parsed(function)
    if not isinstance(node, ast.FunctionDef):
        return {}, None
    return _arguments(node.args), ast.unparse(node.returns) if node.returns else None


def _arguments(arguments: ast.arguments) -> dict[str, dict]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [
        *zip(positional, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
        *((star, None) for star in (arguments.vararg, arguments.kwarg) if star),
    ]
    return {argument.arg: _parts(argument.annotation, value) for argument, value in pairs}


def _of_class(cls) -> tuple[dict, None]:
    """The fields of the class and of its bases, or the arguments of its ``__init__``."""
    written = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("lrjax"):
            for node in _parsed(base).body:
                if isinstance(node, ast.AnnAssign):
                    written[node.target.id] = _parts(node.annotation, node.value)
                elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    written = _arguments(node.args)
    return written, None


def _parts(annotation: ast.expr | None, default: ast.expr | None) -> dict:
    parts = {} if annotation is None else {"annotation": ast.unparse(annotation)}
    # ``eqx.field(static=True)`` stands where a default would, but is none.
    if default is not None and not isinstance(default, ast.Call):
        parts["default"] = Source(default)
    return parts


def _parsed(obj) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
