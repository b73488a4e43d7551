"""quantize_state on every optimizer of optax that keeps moments."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import lrjax


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


# The optimizer, its rate, and how many matrices of moments it keeps of a matrix.
MOMENTS = {
    "adabelief": (optax.adabelief, 0.03, 2),
    "adadelta": (optax.adadelta, 1.0, 2),
    "adafactor": (lambda rate: optax.adafactor(rate, momentum=0.9), 1.0, 2),
    "adagrad": (optax.adagrad, 0.3, 1),
    "adam": (optax.adam, 0.03, 2),
    "adamax": (optax.adamax, 0.03, 2),
    "adamw": (optax.adamw, 0.03, 2),
    "adan": (optax.adan, 0.03, 4),
    "amsgrad": (optax.amsgrad, 0.03, 3),
    "lamb": (optax.lamb, 0.03, 2),
    "lars": (lambda rate: optax.lars(rate, momentum=0.9), 0.3, 1),
    "lion": (optax.lion, 0.03, 1),
    "novograd": (optax.novograd, 0.1, 1),
    "radam": (optax.radam, 0.1, 2),
    "rmsprop": (lambda rate: optax.rmsprop(rate, momentum=0.5), 0.01, 2),
    "sgd": (lambda rate: optax.sgd(rate, momentum=0.9), 3.0, 1),
    "yogi": (optax.yogi, 0.1, 2),
    "acprop": (optax.contrib.acprop, 0.03, 2),
    "ademamix": (optax.contrib.ademamix, 0.01, 3),
    "adopt": (optax.contrib.adopt, 0.03, 2),
    "dadapt_adamw": (optax.contrib.dadapt_adamw, 1.0, 3),
    "momo": (optax.contrib.momo, 10.0, 1),
    "momo_adam": (optax.contrib.momo_adam, 0.1, 2),
    "muon": (optax.contrib.muon, 0.03, 1),
    "prodigy": (optax.contrib.prodigy, 1.0, 3),
    "schedule_free_adamw": (
        lambda rate: optax.contrib.schedule_free_adamw(rate, warmup_steps=5),
        0.03,
        1,  # the other is its parameters'
    ),
    "simplified_ademamix": (optax.contrib.simplified_ademamix, 1e-4, 2),
}
every = pytest.mark.parametrize("name", MOMENTS)
TARGET = jr.normal(jr.key(0), (8, 12))
PARAMS = {"w": jnp.zeros((8, 12)), "b": jnp.zeros(3)}


def loss(params):
    return jnp.mean((params["w"] - TARGET) ** 2) + jnp.mean((params["b"] - 0.5) ** 2)


def end(tx, steps=40):
    """The loss after some steps."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=steps)
    return loss(params)


def moments_at_eight_bits(state):
    is_code = lambda x: isinstance(x, lrjax.subspaces.BlockQuantized)
    fields = [x for x in jax.tree.leaves(state, is_leaf=is_code) if is_code(x)]
    found = [x for field in fields for x in jax.tree.leaves(field.codes)]
    return [x for x in found if x.shape == (8, 12) and x.dtype.itemsize == 1]


@pytest.mark.slow_but("adam", "sgd", "lion", "adagrad")
@every
def test_all_of_its_moments_are_stored_and_it_still_descends(name):
    make, rate, count = MOMENTS[name]
    coded = lrjax.quantize_state(make(rate), block=8, min_size=1)
    assert len(moments_at_eight_bits(jax.eval_shape(coded.init, PARAMS))) == count
    plain, quantized = jax.jit(lambda: (end(make(rate)), end(coded)))()
    start = loss(PARAMS)
    assert plain < 0.9 * start
    assert start - quantized > 0.8 * (start - plain)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (optax.sm3, "ScaleBySM3State"),
        (optax.rprop, "ScaleByRpropState"),
        (optax.contrib.cocob, "COCOBState"),
        (optax.optimistic_gradient_descent, "ScaleByOptimisticGradientState"),
    ],
)
def test_other_states_are_named(make, found):
    tx = lrjax.quantize_state(make(0.1) if make is not optax.contrib.cocob else make())
    with pytest.raises(ValueError, match=rf"made of .*{found}.*register_moments"):
        tx.init(PARAMS)
