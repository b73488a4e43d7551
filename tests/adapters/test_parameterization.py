"""Scale, sizes of the start and rates are one knob: the weights take the same path."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import adapters as room
from tests.helpers import relative_error


STEPS, R = 25, 2
OLD = room.Parameterization.of(0.02, scale=2.0, ratio=3.0, eps=1e-3)
DECAYED = room.Parameterization.of(
    0.02, scale=2.0, eps=1e-3, weight_decay=0.3, coupled_weight_decay=0.2
)
MOMENTS = {
    "sgd": ("sgd", lambda eps: optax.identity()),
    "momentum": ("sgd", lambda eps: optax.trace(0.9)),
    "nesterov": ("sgd", lambda eps: optax.trace(0.8, nesterov=True)),
    "adam": ("adam", lambda eps: optax.scale_by_adam(eps=eps)),
    "nadam": ("adam", lambda eps: optax.scale_by_adam(0.8, 0.9, eps, nesterov=True)),
    "rmsprop": ("adam", lambda eps: optax.scale_by_rms(0.9, eps, eps_in_sqrt=False)),
    "lion": ("adam", lambda eps: optax.scale_by_lion()),
    "muon": ("adam", lambda eps: lrjax.orthogonalize_updates(where=lambda *_: True)),
}
# LoRA -> rsLoRA; LoRA+; another start of A; LoRA+ with another start and what scale
# that takes; both starts.
TARGETS = {
    "rslora": {"scale": 2.0 * R**0.5},
    "lora_plus": {"ratio": 16.0},
    "start": {"right_size": 0.3},
    "ratio_and_start": {"ratio": 0.7, "left_size": 5.0},
    "both_starts": {"left_size": 0.3, "right_size": 7.0},
    "scale_and_ratio": {"scale": 0.4, "ratio": 1.0},
}


@eqx.filter_jit
def problem(key):
    """Two layers, eight inputs, and targets."""
    km, kx, ky = jr.split(key, 3)
    model = eqx.nn.MLP(5, 4, 6, 2, jnp.tanh, key=km)
    return model, jr.normal(kx, (8, 5)), jr.normal(ky, (8, 4))


def path_of_weights(problem, key, own, name, *, start="default", whitened=False):
    """The adapted weights after each of some steps, one after the other in a matrix."""
    own = jax.tree.map(jnp.asarray, own)  # traced: every such knob is of one program
    return np.asarray(_path(problem, key, own, name, start, whitened))


@eqx.filter_jit
def _path(problem, key, own, name, start, whitened):
    model, x, y = problem
    kind = own.kind(lrjax.LoRA(R, init=start))
    params, frozen = lrjax.partition(lrjax.adapt(model, kind, key=key))
    tx = own.optimizer(MOMENTS[name][1])
    tx = optax.chain(lrjax.scale_by_gram(0.1), tx) if whitened else tx

    def weights(params):
        merged = lrjax.merge(model, eqx.combine(params, frozen))
        return jnp.concatenate([layer.weight.ravel() for layer in merged.layers])

    def loss(params):
        return jnp.mean(
            (jax.vmap(lrjax.bind(model, eqx.combine(params, frozen)))(x) - y) ** 2
        )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    path = jax.lax.scan(step, (params, tx.init(params)), None, STEPS)[1]
    return jax.vmap(weights)(path)


def rounding(paths, moments, eps):
    """What rounding may do to the path, of whose size no step is more than a part.

    Adam divides what is a rounding error of the others by eps, where a gradient is small.
    """
    condition = 1.0 if moments == "sgd" else 1 / eps
    return 4 * STEPS * condition * np.finfo(paths.dtype).eps


def compare(getkey, old, name, target, *, start="default", whitened=False):
    moments, _ = MOMENTS[name]
    given, key = problem(getkey()), getkey()
    new = lrjax.equivalent_hyperparameters(old, moments, whitened=whitened, **target)
    run = lambda own: path_of_weights(given, key, own, name, start=start, whitened=whitened)
    want, got = run(old), run(new)
    assert relative_error(want[-1], want[0]) > 0.02  # it does train
    return relative_error(got, want), rounding(want, moments, old.left.eps)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_weights_take_the_same_path(getkey, x64, name, target):
    error, bound = compare(getkey, OLD, name, target)
    assert error < bound


@pytest.mark.slow_but("sgd", "adam", "rmsprop")
@pytest.mark.parametrize("name", MOMENTS)
def test_with_weight_decay_of_both_kinds_and_any_moments(getkey, x64, name):
    error, bound = compare(getkey, DECAYED, name, TARGETS["ratio_and_start"])
    assert error < bound


@pytest.mark.slow_but("olora")
@pytest.mark.parametrize("start", ["orthogonal", "pissa", "olora"])
def test_starts_that_are_not_zero(getkey, x64, start):
    error, bound = compare(getkey, OLD, "adam", TARGETS["rslora"], start=start)
    assert error < bound


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_whitened_steps(getkey, x64, name):
    target = {"scale": 0.7, "right_size": 2.5}
    error, bound = compare(getkey, DECAYED, name, target, whitened=True, start="orthogonal")
    assert error < 10 * bound  # inverses of Gram matrices


def test_whitened_steps_have_nothing_to_convert_at_one_scale():
    new = lrjax.equivalent_hyperparameters(DECAYED, "sgd", whitened=True, right_size=4.0)
    sizes = lambda own: (own.left._replace(size=1.0, eps=0.0), own.right.rate, own.scale)
    assert sizes(new) == sizes(DECAYED)


def test_without_a_new_eps_adam_is_off_by_a_multiple_of_it(getkey, x64):
    given, key = problem(getkey()), getkey()

    def error(eps, converted):
        old = room.Parameterization.of(0.02, scale=2.0, eps=eps)
        new = lrjax.equivalent_hyperparameters(old, "adam", scale=0.5)
        if not converted:
            new = new._replace(
                left=new.left._replace(eps=eps), right=new.right._replace(eps=eps)
            )
        run = lambda own: path_of_weights(given, key, own, "adam")
        return relative_error(run(new), run(old))

    coarse, fine = error(1e-5, False), error(1e-7, False)
    assert 30 < coarse / fine < 300  # the ratio of the two eps is 100
    assert error(1e-5, True) < 1e-3 * fine


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_nothing_but_the_conversion_keeps_the_path(getkey, x64, name):
    """Every number that is converted matters: without it the path is another."""
    given, key = problem(getkey()), getkey()
    moments, _ = MOMENTS[name]
    new = lrjax.equivalent_hyperparameters(DECAYED, moments, **TARGETS["ratio_and_start"])
    run = lambda own: path_of_weights(given, key, own, name)
    want = run(DECAYED)
    fields = ["rate", "size", "weight_decay", "coupled_weight_decay"]
    for field in [*fields, *(["eps"] if name == "adam" else [])]:
        right = new.right._replace(**{field: getattr(DECAYED.right, field)})
        assert relative_error(run(new._replace(right=right)), want) > 1e-6, field


def test_there_and_back_is_the_same_and_the_whole_scale_stays():
    whole = lambda own: own.scale * own.left.size * own.right.size
    for moments in ("sgd", "adam"):
        for target in TARGETS.values():
            new = lrjax.equivalent_hyperparameters(DECAYED, moments, **target)
            named = {
                "scale": new.scale,
                "ratio": new.left.rate / new.right.rate,
                "left_size": new.left.size,
                "right_size": new.right.size,
            }
            for name, value in target.items():
                np.testing.assert_allclose(named[name], value, rtol=1e-14)
            np.testing.assert_allclose(whole(new), whole(DECAYED), rtol=1e-14)
            back = lrjax.equivalent_hyperparameters(
                new, moments, left_size=1.0, right_size=1.0
            )
            same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14)
            jax.tree.map(same, back, DECAYED)


def test_nothing_asked_for_changes_nothing():
    assert lrjax.equivalent_hyperparameters(OLD, "adam") == OLD


@pytest.mark.slow
def test_a_sweep_over_scales_in_one_program_finds_one_run(getkey):
    """Traced: the whole family, from the scale to the optimizer, under one ``vmap``."""
    given, key = problem(getkey()), getkey()

    def last(scale):
        own = lrjax.equivalent_hyperparameters(OLD, "adam", scale=scale)
        kind = own.kind(lrjax.LoRA(R))
        model, x, y = given
        params, frozen = lrjax.partition(lrjax.adapt(model, kind, key=key))
        tx = own.optimizer(MOMENTS["adam"][1])
        bound = lambda p: lrjax.bind(model, eqx.combine(p, frozen))
        loss = lambda p: jnp.mean((jax.vmap(bound(p))(x) - y) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 3)
        return jax.vmap(bound(params))(x)

    outputs = jax.jit(jax.vmap(last))(jnp.array([0.5, 2.0, 8.0]))
    for output in outputs[1:]:
        assert relative_error(output, outputs[0]) < 1e-5


def test_leaves_that_are_no_factors_keep_their_rate(getkey):
    own = lrjax.equivalent_hyperparameters(OLD, "adam", scale=8.0)
    tree = {"pair": lrjax.LowRank(jnp.ones((3, 1)), jnp.ones((2, 1))), "gain": jnp.ones(3)}
    tx = own.optimizer(lambda eps: optax.scale_by_sign())
    step, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_allclose(step["gain"], -0.02, rtol=1e-6)
    np.testing.assert_allclose(step["pair"].left, -0.06 / 4, rtol=1e-6)
    np.testing.assert_allclose(step["pair"].right, -0.02, rtol=1e-6)
    half = {"pair": eqx.tree_at(lambda x: x.right, tree["pair"], None)}  # LoRA-FA
    step, _ = tx.update(half, tx.init(half), half)
    np.testing.assert_allclose(step["pair"].left, -0.06 / 4, rtol=1e-6)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"Two of scale, ratio.*got 3: scale, ratio"):
        lrjax.equivalent_hyperparameters(OLD, scale=1.0, ratio=1.0, left_size=1.0)
    with pytest.raises(ValueError, match="needs a positive scale"):
        lrjax.equivalent_hyperparameters(OLD, scale=-1.0)
    with pytest.raises(ValueError, match="the same for every cut of the product"):
        lrjax.equivalent_hyperparameters(OLD, "sgd", whitened=True, ratio=2.0)
    with pytest.raises(TypeError, match="LoRA"):
        OLD.kind(lrjax.VeRA(4))
