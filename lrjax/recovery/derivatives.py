"""What has no derivative says so, in both modes, in place of a number that is none."""

import functools
from typing import TypeVar

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import PyTree


T = TypeVar("T")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse_derivatives(sentence: str, inputs: T) -> T:
    """Pass inputs on; differentiating by any of them raises.

    Values, ``jit`` and ``vmap`` are as without it. What is constant in a differentiated
    function, or made so by ``lax.stop_gradient``, passes.

    Args:
        sentence: what has no derivative, why not, and what has one in its place.
        inputs: a pytree of arrays and numbers.

    Raises:
        ValueError: when a function that has this in it is differentiated, by ``jvp``,
            ``linearize``, ``grad`` or ``vjp``.
    """
    return inputs


@functools.partial(refuse_derivatives.defjvp, symbolic_zeros=True)
def _(sentence: str, primals: tuple[PyTree], tangents: tuple[PyTree]):
    is_zero = lambda t: isinstance(t, SymbolicZero)
    if not all(map(is_zero, jax.tree.leaves(tangents, is_leaf=is_zero))):
        raise ValueError(sentence)
    return primals[0], tangents[0]
