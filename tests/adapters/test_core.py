"""Small cores between frozen factors: their papers' formulas, and their special cases."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import scipy.linalg

import lrjax
from lrjax.adapters import (
    PMSS,
    Core,
    EigenLoRAx,
    LoLDU,
    LoTR,
    NoRA,
    PoLAR,
    StelLA,
    SVFit,
    TinyLoRA,
)
from tests.adapters.models import moved
from tests.helpers import assert_close, relative_error, tol
from tests.reference import adapters as reference


@pytest.fixture
def model(getkey):
    return {"w": jr.normal(getkey(), (7, 5)) / 2}


@eqx.filter_jit
def moved_and_merged(model, kind, key):
    """Adapters with all that is trained moved, the merged model, and that of the start."""
    where = lambda path, _: True
    start = lrjax.adapt(model, kind, where=where, key=key)
    params, frozen = lrjax.partition(start)
    adapters = eqx.combine(moved(params, key), frozen)
    return adapters, lrjax.merge(model, adapters), lrjax.merge(model, start)


def f64(x):
    return np.asarray(x, np.float64)


def test_tiny_lora_is_its_formula_and_with_unit_matrices_a_core(model, getkey):
    adapters, merged, _ = moved_and_merged(model, TinyLoRA(2, 4), getkey())
    own = adapters["w"]
    b, a, core = f64(own.pair.left), f64(own.pair.right).T, own.core
    want = reference.tiny_lora(f64(model["w"]), b, f64(core.matrices), f64(core.weights), a)
    assert relative_error(merged["w"], want) < tol(merged["w"])
    values = np.linalg.svd(f64(model["w"]), compute_uv=False)[:2]
    np.testing.assert_allclose(b.T @ b, np.diag(values), atol=1e-5)
    np.testing.assert_allclose(a @ a.T, np.diag(values), atol=1e-5)

    units = eqx.tree_at(
        lambda a: a["w"].core.matrices, adapters, jnp.eye(4).reshape(4, 2, 2)
    )
    full = core.weights.reshape(2, 2)
    dense = Core(own.pair, full, None, own.scale, None)
    same = lrjax.adapters.Adapters({"w": dense})
    assert_close(lrjax.merge(model, units), lrjax.merge(model, same))


def test_random_cores_have_the_variance_of_a_projection(getkey):
    adapters = lrjax.adapt(jnp.eye(8), TinyLoRA(8, 256), where="", key=getkey())
    # 16,384 normal numbers: the deviation is known to 0.6 percent.
    np.testing.assert_allclose(np.std(adapters[""].core.matrices), 8**-0.5, rtol=0.04)


@pytest.mark.slow
def test_one_v_of_many_matrices_gets_the_sum_of_their_gradients(getkey):
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 5, key=key))
    model = {
        "blocks": make(jr.split(getkey(), 3)),
        "last": eqx.nn.Linear(5, 4, key=getkey()),
    }

    @eqx.filter_jit
    def gradients(key):
        def gradient(kind):
            params, frozen = lrjax.partition(lrjax.adapt(model, kind, key=key))

            def loss(params):
                merged = lrjax.merge(model, eqx.combine(params, frozen))
                weights = jnp.sum(merged["blocks"].weight ** 3)
                return weights + jnp.sum(merged["last"].weight ** 3)

            return jax.grad(loss)(params)

        return gradient(TinyLoRA(2, 3, group="v")), gradient(TinyLoRA(2, 3))

    shared, own = gradients(getkey())
    want = jnp.sum(own["blocks"].core.weights, axis=0) + own["last"].core.weights
    assert_close(shared.pools["v"].vector, want, condition=100)
    assert jax.tree.leaves(shared.layers) == []


def test_svfit_has_the_trained_singular_values(model, getkey):
    adapters, merged, start = moved_and_merged(model, SVFit(3), getkey())
    assert_close(start, model, condition=10)
    own, weight = adapters["w"], f64(model["w"])
    u, v = f64(own.pair.left), f64(own.pair.right)
    values = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(own.start, values[:3], rtol=1e-4)
    np.testing.assert_allclose(weight @ v, u * values[:3], atol=1e-5)
    np.testing.assert_allclose(f64(merged["w"]) @ v, u * f64(own.core), atol=1e-5)
    rest = np.linalg.svd(f64(merged["w"]), compute_uv=False)
    trained = np.abs(f64(own.core))
    want = np.sort(np.concatenate([trained, values[3:]]))[::-1]
    np.testing.assert_allclose(rest, want, atol=1e-5)


def test_a_diagonal_core_of_lora_xs_is_svfit(model, getkey):
    adapters, merged, _ = moved_and_merged(model, SVFit(3), getkey())
    own = adapters["w"]
    full = Core(own.pair, jnp.diag(own.core - own.start), None, own.scale, None)
    same = lrjax.merge(model, lrjax.adapters.Adapters({"w": full}))
    assert_close(same, merged)


@pytest.mark.parametrize("tall", [True, False])
def test_loldu_is_the_residual_form(tall, model, getkey):
    model = model if tall else {"w": model["w"].T}
    adapters, merged, start = moved_and_merged(model, LoLDU(3, 6.0), getkey())
    want = reference.loldu(f64(model["w"]), 3, f64(adapters["w"].core), 2.0)
    assert relative_error(merged["w"], want) < tol(merged["w"], condition=100)
    assert_close(start, model)


@pytest.mark.slow
def test_a_zero_pivot_does_no_harm(getkey):
    weight = jnp.array([[0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    for kind in (LoLDU(3), PMSS(3)):
        adapters, merged, start = moved_and_merged({"w": weight}, kind, getkey())
        assert np.all(np.isfinite(merged["w"]))
        assert_close(start["w"], weight)
        assert_close(adapters["w"].pair, jax.tree.map(jnp.nan_to_num, adapters["w"].pair))


@pytest.mark.slow
def test_pmss_takes_columns_and_rows_that_span_the_weight(getkey):
    """Of a matrix of rank r: ``W = C W[I, J]⁻¹ R``, the skeleton decomposition."""
    left, right = jr.normal(getkey(), (7, 2)), jr.normal(getkey(), (5, 2))
    weight = left @ right.T
    own = lrjax.adapt({"w": weight}, PMSS(2, 4.0), where="w", key=getkey())["w"]
    columns = scipy.linalg.qr(f64(weight), mode="r", pivoting=True)[1][:2]
    rows = scipy.linalg.qr(f64(weight).T, mode="r", pivoting=True)[1][:2]
    np.testing.assert_array_equal(own.pair.left, weight[:, columns])
    np.testing.assert_array_equal(own.pair.right, weight[rows].T)
    core = np.linalg.inv(f64(weight)[np.ix_(rows, columns)]) / 2.0  # s = 2
    filled = Core(own.pair, jnp.asarray(core, jnp.float32), None, own.scale, None)
    merged = lrjax.merge({"w": weight}, lrjax.adapters.Adapters({"w": filled}))
    condition = np.linalg.cond(f64(weight)[np.ix_(rows, columns)])
    assert relative_error(merged["w"], 2 * f64(weight)) < tol(weight, condition=condition)


def test_nora_is_its_formula(model, getkey):
    adapters, merged, _ = moved_and_merged(model, NoRA(2, 3, 5.0), getkey())
    pair, core, weight = adapters["w"].pair, adapters["w"].core, f64(model["w"])
    b, a = f64(pair.left), f64(pair.right).T
    values = np.linalg.svd(weight, compute_uv=False)[:3]
    np.testing.assert_allclose(b.T @ weight @ a.T, np.diag(values**2), atol=1e-4)
    np.testing.assert_allclose(b.T @ b, np.diag(values), atol=1e-4)
    want = reference.nora(weight, b, f64(core.left), f64(core.right).T, a, 2.5)
    assert relative_error(merged["w"], want) < tol(merged["w"], condition=10)


@pytest.mark.slow
def test_eigenlorax_finds_the_directions_of_older_adapters(getkey):
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(9, 8, key=key))
    model = make(jr.split(getkey(), 2))
    old = [moved_and_merged(model, lrjax.LoRA(2), getkey())[0] for _ in range(2)]
    kind = EigenLoRAx(old, 2, components=3, random=2)
    adapters, merged, start = moved_and_merged(model, kind, getkey())
    pair, core = adapters[""].pair, adapters[""].core
    for i, side in ((0, "left"), (1, "right")):
        basis = f64(getattr(pair, side)[i])
        np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)
        columns = np.concatenate([f64(getattr(a[""].pair, side)[i]) for a in old], axis=1)
        # Four columns without their mean have three directions, all of them found.
        centred = columns - columns.mean(axis=1, keepdims=True)
        principal = basis[:, :3]
        np.testing.assert_allclose(principal @ (principal.T @ centred), centred, atol=1e-5)
    for i in range(2):
        left, right = (f64(getattr(pair, k)[i]) @ f64(getattr(core, k)[i]) for k in SIDES)
        want = f64(model.weight[i]) + left @ right.T
        assert relative_error(merged.weight[i], want) < tol(merged.weight, condition=10)
    # As in the authors' code the loadings start at random, which changes the model.
    assert relative_error(start.weight, model.weight) > 1e-3


SIDES = ("left", "right")


def test_what_eigenlorax_cannot_use_is_refused(model, getkey):
    lora, dora = (
        lrjax.adapt(model, kind, where="w", key=getkey())
        for kind in (lrjax.LoRA(2), lrjax.DoRA(2))
    )
    adapt = lambda model, kind: lrjax.adapt(
        model, kind, where=lambda *_: True, key=getkey()
    )
    with pytest.raises(ValueError, match=r"without one at v: it has \['w'\]"):
        adapt({"v": model["w"]}, EigenLoRAx([lora]))
    with pytest.raises(ValueError, match=r"is a Magnitude .*as_lora can make it one"):
        adapt(model, EigenLoRAx([dora]))
    with pytest.raises(ValueError, match="3 components and 1 random directions at w"):
        adapt(model, EigenLoRAx([lora], components=3, random=1))
    with pytest.raises(ValueError, match="at least one older adapter"):
        EigenLoRAx([])


@pytest.mark.slow
def test_lotr_of_one_layer_is_a_tucker_form(model, getkey):
    """Three trained factors, of which a pool holds two: value and gradient."""
    adapters, merged, start = moved_and_merged(model, LoTR(2, 6.0), getkey())
    assert_close(start, model)
    own, pool = adapters["w"], adapters.pools["LoTR"]
    assert own.shape == pool.shape == (7, 5)
    tucker = Core(pool.pair, own.core, None, own.scale, None, train="all")
    same = lrjax.adapters.Adapters({"w": tucker})
    loss = lambda a: jnp.sum(lrjax.merge(model, a)["w"] ** 3)
    assert_close(lrjax.merge(model, same), merged)
    got, want = (jax.grad(loss)(a) for a in (adapters, same))
    assert_close(got.pools["LoTR"].pair, want["w"].pair, condition=10)
    assert_close(got["w"].core, want["w"].core, condition=10)


def descent(model, kind, tx, steps, stretch=1.0):
    """Adapters trained on a weight that is far away, and how far their columns went."""

    @eqx.filter_jit
    def run(model, key):
        params, frozen = lrjax.partition(lrjax.adapt(model, kind, where="w", key=key))
        longer = jax.tree.map(lambda x: stretch * x, params["w"].pair)
        params = eqx.tree_at(lambda p: p["w"].pair, params, longer)

        def loss(params):
            merged = lrjax.merge(model, eqx.combine(params, frozen))
            return jnp.mean((merged["w"] - 1.0) ** 2)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            gaps = [x.mT @ x - jnp.eye(2) for x in jax.tree.leaves(params["w"].pair)]
            return (params, state), (value, jnp.max(jnp.abs(jnp.stack(gaps))))

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]

    return run


@pytest.mark.slow
def test_a_training_run_of_stella_stays_on_the_manifold(model, getkey):
    chain = (lrjax.landing_field(0.0), optax.adam(0.05), lrjax.keep_orthonormal())
    losses, gaps = descent(model, StelLA(2), optax.chain(*chain), 60)(model, getkey())
    assert losses[-1] < 0.9 * losses[0]
    assert np.max(gaps) < tol(model["w"])
    # What holds them there is the transform: Adam alone leaves at once.
    _, gaps = descent(model, StelLA(2), optax.adam(0.05), 60)(model, getkey())
    assert gaps[0] > 1e-2


@pytest.mark.slow
def test_a_training_run_of_polar_lands_on_the_manifold(model, getkey):
    """From columns that are a fifth too long, by small steps along the field."""
    run = lambda pull: optax.chain(lrjax.landing_field(pull), optax.sgd(0.02))
    losses, gaps = descent(model, PoLAR(2), run(1.0), 200, 1.2)(model, getkey())
    assert losses[-1] < losses[0]
    # What is too long decays by e^(-2 · 0.02) a step, from 0.44.
    assert gaps[0] > 0.3
    assert gaps[-1] < 0.02
    # It is the pull that shortens them: without it they stay.
    _, gaps = descent(model, PoLAR(2), run(0.0), 200, 1.2)(model, getkey())
    assert gaps[-1] > 0.3
