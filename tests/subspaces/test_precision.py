"""At which precision a step multiplies: what is in force, or all of it where it counts."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

import lrjax
from lrjax.linalg import product_rounding


SHAPE = (24, 40)


def all_products(tx, dtype=jnp.float32, context=None):
    """Of all products in an update: the shapes that meet and come out, the precision."""
    grads = {"weight": jnp.ones(SHAPE, dtype)}
    state = tx.init(grads)
    with context or contextlib.nullcontext():
        jaxpr = jax.make_jaxpr(tx.update)(grads, state, grads)
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                shapes = [x.aval.shape for x in (*eqn.invars, *eqn.outvars)]
                precision = eqn.params["precision"]
                pair = precision if isinstance(precision, tuple) else (precision,)
                found.append((shapes, {str(p) for p in pair}))
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jaxpr.jaxpr)
    return found


def meets(shapes):
    """Whether the gradient is among them."""
    return any(sorted(s) == sorted(SHAPE) for s in shapes)


def products(tx, dtype=jnp.float32, context=None):
    """The precisions of products with the gradient, and of all others."""
    found = all_products(tx, dtype, context)
    with_gradient = set().union(*(p for s, p in found if meets(s)))
    others = set().union(*(p for s, p in found if not meets(s)))
    return with_gradient, others


RECIPES = {
    "subspace_adam": lrjax.subspace_adam,
    "apollo": lrjax.apollo,
    "dion": lrjax.dion,
}


@pytest.mark.slow_but("apollo")
@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_is_multiplied_as_is_in_force(name):
    make = lambda **settings: RECIPES[name](1e-3, 4, **settings)
    assert products(make())[0] == {"None"}
    assert products(make(precision="highest"))[0] == {"HIGHEST"}
    assert products(make(), jnp.bfloat16)[0] == {"BF16_BF16_F32"}
    assert products(make(precision="highest"), jnp.bfloat16)[0] == {"HIGHEST"}
    full = jax.default_matmul_precision("highest")
    assert products(make(), jnp.bfloat16, full)[0] == {"HIGHEST"}


def test_small_factorizations_are_at_full_precision():
    """But for the projection of one block off the others, and what carries moments."""
    assert "HIGHEST" in products(lrjax.subspace_adam(1e-3, 4))[1]
    others = [x for x in all_products(lrjax.ldadam(1e-3, 4)) if not meets(x[0])]
    carried = [shapes[-1] for shapes, precision in others if precision == {"None"}]
    assert set(carried) == {(4, SHAPE[1])}  # of the moments
    assert {"HIGHEST"} == set().union(*(p for s, p in others if s[-1] not in carried))


def test_moments_outlive_bfloat16_gradients():
    """They are carried at full precision: their own numbers are float32."""
    assert products(lrjax.ldadam(1e-3, 4), jnp.bfloat16)[1] == {"HIGHEST"}


def test_rounding_is_that_of_the_platform(x64):
    """4 · 2⁻⁸ of bfloat16 on TPU, 4 · 2⁻¹¹ of TF32 on GPU, that of float32 on CPU."""
    size = 4096
    exact = 8 * float(jnp.finfo(jnp.float32).eps) * size**0.5
    assert product_rounding(jnp.float32, size) == pytest.approx(exact)
    assert product_rounding(jnp.float64, size) < 1e-12
    text = lambda platform: (
        jax.export.export(
            jax.jit(lambda: product_rounding(jnp.float32, size)), platforms=[platform]
        )()
        .mlir_module()
        .lower()
    )
    assert "1.5625" in text("tpu")
    assert "0.001953125" in text("cuda") or "1.953125" in text("cuda")
    with jax.default_matmul_precision("highest"):
        assert "1.5625" not in text("tpu")
