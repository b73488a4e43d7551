"""What users hand over by mistake, told in one sentence each, wherever it happens."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


Factory = TypeVar("Factory", bound=Callable[..., Any])


def check_key(function: str, key: Any) -> None:
    """Refuse what is no single key: a seed, a NumPy array, an array of keys."""
    if key is None:
        return
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if key.shape:
            raise ValueError(
                f"{function} needs one key, got {key.shape} of them: take one, keys[0], or "
                f"jax.vmap over all."
            )
        return
    if dtype == jnp.uint32 and key.shape in ((2,), (4,)):  # jax.random.PRNGKey
        return
    seed = key if isinstance(key, int) and not isinstance(key, bool) else 0
    got = repr(key) if dtype is None else f"an array of {dtype} and shape {jnp.shape(key)}"
    raise TypeError(f"{function} needs a key such as jax.random.key({seed}), got {got}.")


def check_parameters(function: str, params: PyTree) -> None:
    """Refuse leaves that no gradient can reach: functions, strings, integers."""
    for path, x in jtu.tree_flatten_with_path(params)[0]:
        where = jtu.keystr(path, simple=True, separator=".") or "the root"
        # Numbers of Python, shapes without values, arrays of any library.
        dtype = jnp.result_type(x) if isinstance(x, float | int) else _dtype(x)
        if dtype is None:
            raise TypeError(
                f"{function} needs parameters that are arrays, but {where} is "
                f"{_kind(x)}: pass eqx.filter(model, eqx.is_inexact_array) in place of the "
                "model."
            )
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{function} needs floating-point parameters, but {where} is {dtype}, "
                "which has no gradient: keep such leaves out with eqx.filter(params, "
                "eqx.is_inexact_array), or cast them, x.astype(float)."
            )


def _dtype(x: Any) -> Any:
    return getattr(x, "dtype", None) if hasattr(x, "shape") else None


def _kind(x: Any) -> str:
    if callable(x):
        return f"the function {getattr(x, '__name__', x)}"
    return f"{x!r} of {type(x)}"


def check_like_parameters(function: str, updates: PyTree, params: PyTree | None) -> None:
    """Refuse gradients whose shapes are not those of the parameters."""
    if params is None:
        return
    grads, structure = jtu.tree_flatten_with_path(updates)
    leaves, other = jax.tree.flatten(params)
    if structure != other:  # masked and grouped trees: each transform has its own say
        return
    for (path, grad), x in zip(grads, leaves, strict=True):
        if jnp.shape(grad) != jnp.shape(x):
            where = jtu.keystr(path, simple=True, separator=".") or "the root"
            raise ValueError(
                f"{function} needs gradients of the shapes of the parameters, but at "
                f"{where} the gradient has shape {jnp.shape(grad)} and the parameter "
                f"{jnp.shape(x)}: call tx.update(grads, state, params) with grads = "
                "jax.grad(loss)(params), at the parameters that tx.init saw."
            )


def checks_trees(factory: Factory) -> Factory:
    """Decorate what makes an optax transform: it looks at the trees that it is given.

    ``init`` refuses leaves that are no floating-point arrays, ``update`` gradients that do
    not have the shapes of the parameters, and the factory itself a seed for a key.
    """
    name = getattr(factory, "__name__", "the transform")

    @functools.wraps(factory)
    def make(*args, **kwargs):
        check_key(name, kwargs.get("key"))
        tx = factory(*args, **kwargs)

        def init(params):
            check_parameters(name, params)
            return tx.init(params)

        def update(updates, state, params=None, **extra):
            check_like_parameters(name, updates, params)
            return tx.update(updates, state, params, **extra)

        return tx._replace(init=init, update=update)

    return make  # pyright: ignore[reportReturnType]
