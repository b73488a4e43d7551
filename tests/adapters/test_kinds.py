"""Each kind against its paper's formula in float64, and what is true of it alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.adapters import BoRA, Full, WithMagnitude
from tests.adapters.models import moved
from tests.helpers import assert_close, relative_error, tol
from tests.reference import adapters as reference


def linear(getkey, m=7, n=5):
    return eqx.nn.Linear(n, m, key=getkey())


def moved_adapter(layer, kind, getkey):
    adapters = lrjax.adapt(layer, kind, key=getkey())
    params, frozen = lrjax.partition(adapters)
    return eqx.combine(moved(params, getkey()), frozen)


def f64(x):
    return np.asarray(x, np.float64)


def assert_weight(layer, adapters, want):
    """Both the merged weight and the bound call are those of a dense matrix."""
    assert relative_error(lrjax.merge(layer, adapters).weight, want) < tol(layer.weight)
    x = np.linspace(-1, 1, layer.in_features)
    want = want @ x + f64(layer.bias)
    got = lrjax.bind(layer, adapters)(jnp.asarray(x, jnp.float32))
    assert relative_error(got, want) < tol(layer.weight, condition=10)


def test_pissa_is_the_residual_form_and_takes_the_leading_triplets(getkey):
    layer = linear(getkey)
    kind = lrjax.LoRA(2, 3.0, init="pissa")
    start = lrjax.adapt(layer, kind, key=getkey())[""]
    w, scale = f64(layer.weight), 1.5
    b0, a0 = f64(start.pair.left), f64(start.pair.right).T
    values = np.linalg.svd(w, compute_uv=False)
    left = np.linalg.svd(w - scale * b0 @ a0, compute_uv=False)
    np.testing.assert_allclose(left[:3], values[2:], atol=1e-5)
    np.testing.assert_allclose(b0.T @ b0, a0 @ a0.T, atol=1e-5)  # √Σ on both sides

    adapters = moved_adapter(layer, kind, getkey)
    pair = adapters[""].pair
    b, a = f64(pair.left), f64(pair.right).T
    b0, a0 = f64(adapters[""].start.left), f64(adapters[""].start.right).T
    assert_weight(layer, adapters, reference.residual(w, b, a, b0, a0, scale))
    # What it is exported as: a plain pair of twice the width on the untouched base.
    twice, same = adapters[""].factors()
    assert twice.rank == 4
    assert_weight(
        layer, adapters, reference.lora(w, f64(twice.left), f64(twice.right).T, same)
    )


def test_dora_has_rows_of_the_trained_lengths(getkey):
    layer = linear(getkey)
    adapters = moved_adapter(layer, lrjax.DoRA(2, 3.0), getkey)
    inner, m = adapters[""].inner, f64(adapters[""].magnitude)
    factors = f64(inner.pair.left), f64(inner.pair.right).T
    assert_weight(layer, adapters, reference.dora(f64(layer.weight), *factors, 1.5, m))


def test_dora_with_the_lengths_of_lora_is_lora(getkey):
    layer = linear(getkey)
    adapters = moved_adapter(layer, lrjax.DoRA(2), getkey)
    plain = lrjax.adapters.Adapters({"": adapters[""].inner})
    lengths = jnp.linalg.norm(lrjax.merge(layer, plain).weight, axis=1)
    same = eqx.tree_at(lambda a: a[""].magnitude, adapters, lengths)
    assert_close(
        lrjax.merge(layer, same).weight, lrjax.merge(layer, plain).weight, condition=10
    )


def test_bora_has_rows_then_columns_of_the_trained_lengths(getkey):
    layer = linear(getkey)
    adapters = moved_adapter(layer, BoRA(2, 3.0), getkey)
    own, weight = adapters[""], f64(layer.weight)
    factors = f64(own.inner.pair.left), f64(own.inner.pair.right).T
    m, c = f64(own.magnitude), f64(own.columns)
    assert_weight(layer, adapters, reference.bora(weight, *factors, 1.5, m, c))
    # With the lengths of the columns of H it is DoRA.
    dora = reference.dora(weight, *factors, 1.5, m)
    lengths = jnp.asarray(np.linalg.norm(dora, axis=0), jnp.float32)
    same = eqx.tree_at(lambda a: a[""].columns, adapters, lengths)
    assert_weight(layer, same, dora)


def test_edora_is_dora_around_the_factors_of_lora_xs(getkey):
    layer = linear(getkey)
    adapters = moved_adapter(layer, WithMagnitude(lrjax.LoRAXS(2)), getkey)
    own = adapters[""]
    pair, scale = own.inner.factors()
    dora = lrjax.adapt(layer, lrjax.DoRA(2), key=getkey())
    dora = eqx.tree_at(
        lambda a: (a[""].magnitude, a[""].inner.pair, a[""].inner.scale),
        dora,
        (own.magnitude, pair, scale),
    )
    merged = lrjax.merge(layer, adapters)
    assert_close(lrjax.merge(layer, dora), merged, condition=10)


def test_row_norms_from_thin_products_survive_cancellation(getkey):
    """The change takes most of W off; the norm is that of what is left."""
    layer = linear(getkey, 40, 30)
    u, s, vt = np.linalg.svd(f64(layer.weight))
    w = jnp.asarray(u[:, :3] * s[:3] @ vt[:3], jnp.float32)
    layer = eqx.tree_at(lambda l: l.weight, layer, w)
    adapters = lrjax.adapt(layer, lrjax.DoRA(3), key=getkey())
    left = jnp.asarray(-0.9 * u[:, :3] * s[:3], jnp.float32)
    pair = lrjax.LowRank(left, jnp.asarray(vt[:3].T, jnp.float32))
    adapters = eqx.tree_at(lambda a: a[""].inner.pair, adapters, pair)
    got = np.linalg.norm(f64(lrjax.merge(layer, adapters).weight), axis=1)
    np.testing.assert_allclose(got, f64(adapters[""].magnitude), rtol=1e-4)


def test_norm_of_dora_has_no_gradient_and_zero_rows_stay_finite(getkey):
    layer = linear(getkey)
    layer = eqx.tree_at(lambda l: l.weight, layer, layer.weight.at[2].set(0.0))
    adapters = lrjax.adapt(layer, lrjax.DoRA(2), key=getkey())
    params, frozen = lrjax.partition(adapters)
    x = jr.normal(getkey(), (5,))

    def loss(params):
        return jnp.sum(lrjax.bind(layer, eqx.combine(params, frozen))(x) ** 3)

    got = jax.grad(loss)(params)[""]
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(got))
    # With n constant the directional derivative along W itself is m's alone.
    y = layer(x) - layer.bias
    rows = jnp.linalg.norm(layer.weight, axis=1)
    rows = jnp.where(rows > 0, rows, 1)
    want = 3 * layer(x) ** 2 * y / rows
    assert_close(got.magnitude, want, condition=100)


def test_a_call_of_dora_computes_no_norm(getkey):
    """Prepared once: a call holds the products of LoRA and one scaling."""
    layer = eqx.nn.Linear(64, 64, key=getkey())
    flops = {}
    for name, kind in (("lora", lrjax.LoRA(4)), ("dora", lrjax.DoRA(4))):
        bound = lrjax.bind(layer, lrjax.adapt(layer, kind, key=getkey()))
        arrays, static = eqx.partition(bound, eqx.is_array)
        call = jax.jit(lambda a, x, s=static: eqx.combine(a, s)(x))
        cost = call.lower(arrays, jnp.ones(64)).compile().cost_analysis()
        flops[name] = cost["flops"]
    assert flops["dora"] <= flops["lora"] + 4 * 64


def test_lora_xs_is_a_core_between_singular_vectors(getkey):
    layer = linear(getkey)
    adapters = moved_adapter(layer, lrjax.LoRAXS(2, 3.0), getkey)
    pair, core = adapters[""].pair, f64(adapters[""].core)
    u = f64(pair.left)
    values = np.linalg.norm(f64(pair.right), axis=0)
    v = f64(pair.right) / values
    np.testing.assert_allclose(u.T @ u, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(v.T @ v, np.eye(2), atol=1e-5)
    want = np.linalg.svd(f64(layer.weight), compute_uv=False)[:2]
    np.testing.assert_allclose(values, want, atol=1e-5)
    np.testing.assert_allclose(f64(layer.weight) @ v, u * values, atol=1e-5)
    got = reference.lora_xs(f64(layer.weight), u, core, values, v, 1.5)
    assert_weight(layer, adapters, got)
    factors, scale = adapters[""].factors()
    exported = f64(factors.left), f64(factors.right).T
    assert_weight(layer, adapters, reference.lora(f64(layer.weight), *exported, scale))


def test_lora_xs_starts_next_to_the_model(getkey):
    core = lrjax.adapt(linear(getkey, 40, 40), lrjax.LoRAXS(32), key=getkey())[""].core
    # 1,024 normal numbers: the standard error of their deviation is 2.2 percent.
    np.testing.assert_allclose(np.std(core), 1e-5, rtol=0.15)


@pytest.mark.slow_but("kind1")
@pytest.mark.parametrize("kind", [lrjax.VeRA(3), lrjax.TiedLoRA(3, 6.0)])
def test_scalings_of_a_shared_pair(kind, getkey):
    model = [linear(getkey, 7, 5), linear(getkey, 4, 6)]
    adapters = moved_adapter(model, kind, getkey)
    (pool,) = adapters.pools.values()
    assert pool.pair.shape == (7, 6)
    scale = 1.0 if isinstance(kind, lrjax.VeRA) else 2.0
    for i, layer in enumerate(model):
        own = adapters[str(i)]
        want = reference.vera(
            f64(layer.weight),
            scale * f64(own.outputs),
            f64(pool.pair.left),
            f64(own.ranks),
            f64(pool.pair.right).T,
        )
        alone = lrjax.adapters.Adapters({"": own}, adapters.pools)
        assert_weight(layer, alone, want)
        pair, factor = own.factors(pool)
        got = f64(layer.weight) + float(factor) * f64(pair.materialize())
        assert relative_error(got, want) < tol(layer.weight)


def test_vera_starts_as_its_paper_says(getkey):
    layer = linear(getkey, 64, 96)
    adapters = lrjax.adapt(layer, lrjax.VeRA(256), key=getkey())
    pair = adapters.pools["VeRA"].pair
    assert not np.any(adapters[""].outputs)
    np.testing.assert_allclose(adapters[""].ranks, 0.1)
    # Kaiming uniform: variance 2 by the inputs, 256 of B and 96 of A; 16,384 numbers and
    # more, whose deviation is known to half a percent.
    np.testing.assert_allclose(np.std(pair.left), np.sqrt(2 / 256), rtol=0.04)
    np.testing.assert_allclose(np.std(pair.right), np.sqrt(2 / 96), rtol=0.04)


def test_tied_lora_with_a_frozen_pair_is_vera(getkey):
    """The same pool and vectors: the same weight, with fewer numbers trained."""
    layer = linear(getkey)
    adapters = moved_adapter(layer, lrjax.TiedLoRA(3, group="one"), getkey)
    vera = lrjax.adapt(layer, lrjax.VeRA(3, group="one"), key=getkey())
    swapped = lrjax.adapters.Adapters(
        adapters.layers,
        {"one": lrjax.adapters.FactorPool(adapters.pools["one"].pair, "none")},
    )
    assert_close(lrjax.merge(layer, swapped), lrjax.merge(layer, adapters))
    count = lambda a: sum(x.size for x in jax.tree.leaves(lrjax.partition(a)[0]))
    assert count(swapped) == count(vera) == 7 + 3
    assert count(adapters) == 7 + 3 + 3 * (7 + 5)


@pytest.mark.slow
def test_full_trains_weight_and_bias_and_takes_vectors(getkey):
    model = {"norm": eqx.nn.LayerNorm(5), "head": linear(getkey, 3, 5)}
    adapters = lrjax.adapt(model, Full(), where=lambda path, layer: True, key=getkey())
    assert set(adapters.layers) == {"norm.weight", "norm.bias", "head"}
    params, frozen = lrjax.partition(adapters)
    assert sum(x.size for x in jax.tree.leaves(params)) == 5 + 5 + 3 * 5 + 3
    call = lambda model, x: model["head"](model["norm"](x))
    x = jr.normal(getkey(), (5,))

    def loss(params):
        return jnp.sum(call(lrjax.bind(model, eqx.combine(params, frozen)), x) ** 2)

    got = jax.grad(loss)(params)
    want = eqx.filter_grad(lambda model: jnp.sum(call(model, x) ** 2))(model)
    assert_close(got["head"].matrix, want["head"].weight)
    assert_close(got["head"].bias, want["head"].bias)
    assert_close(got["norm.weight"].matrix[:, 0], want["norm"].weight)
    assert_close(got["norm.bias"].matrix[:, 0], want["norm"].bias)
    with pytest.raises(ValueError, match=r"norm\.weight is a vector \(5,\), which LoRA"):
        lrjax.adapt(model, lambda path, site: lrjax.LoRA(2), key=getkey())


def test_float32_copies_of_a_half_precision_model(getkey):
    layer = eqx.nn.Linear(5, 3, dtype=jnp.bfloat16, key=getkey())
    adapters = lrjax.adapt(layer, Full(dtype=jnp.float32), key=getkey())
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    assert eqx.tree_equal(lrjax.merge(layer, adapters), layer)


def test_magnitude_goes_around_any_kind(getkey):
    layer = linear(getkey)
    for kind in (lrjax.LoRAXS(2), lrjax.VeRA(3), Full()):
        adapters = moved_adapter(layer, WithMagnitude(kind), getkey)
        rows = np.linalg.norm(f64(lrjax.merge(layer, adapters).weight), axis=1)
        np.testing.assert_allclose(rows, np.abs(f64(adapters[""].magnitude)), rtol=1e-4)
        x = jr.normal(getkey(), (5,))
        bound, merged = lrjax.bind(layer, adapters)(x), lrjax.merge(layer, adapters)(x)
        assert_close(bound, merged, condition=100)


@pytest.mark.parametrize("train", ["left", "right"])
@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_the_factor_that_is_trained_alone_starts_at_zero_and_has_a_gradient(
    train, layer, getkey
):
    make = {"linear": linear, "embedding": lambda k: eqx.nn.Embedding(5, 7, key=k())}
    model, x = make[layer](getkey), jnp.ones(5) if layer == "linear" else jnp.int32(2)
    kind = lrjax.LoRA(3, train=train)
    adapters = lrjax.adapt(model, kind, where=lambda path, layer: True, key=getkey())
    params, frozen = lrjax.partition(adapters)
    assert jax.tree.leaves(params)[0].shape == ((7, 3) if train == "left" else (5, 3))
    assert not np.any(jax.tree.leaves(params)[0])
    loss = lambda p: jnp.sum(lrjax.bind(model, eqx.combine(p, frozen))(x) ** 2)
    assert np.any(jax.tree.leaves(jax.grad(loss)(params))[0])


def test_gram_scaling_of_half_frozen_pairs_takes_the_whole_adapters(getkey):
    layer, x = linear(getkey), jr.normal(getkey(), (5,))
    adapters = moved_adapter(layer, lrjax.LoRA(2, train="left"), getkey)
    tx = lrjax.scale_by_gram()
    loss = lambda a: jnp.sum(lrjax.bind(layer, a)(x) ** 2)
    grads = jax.grad(loss)(adapters)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    got, right = updates[""].pair, f64(adapters[""].pair.right)
    want = f64(grads[""].pair.left) @ np.linalg.inv(right.T @ right)
    assert relative_error(got.left, want) < 1e-3
    after = optax.apply_updates(adapters, updates)
    assert eqx.tree_equal(after[""].pair.right, adapters[""].pair.right)
    params, _ = lrjax.partition(adapters)
    with pytest.raises(ValueError, match=r"adapt\(train=…\) froze one"):
        tx.update(lrjax.partition(grads)[0], tx.init(params), params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lrjax.LoRA(2, train="B"), "train"),
        (lambda: lrjax.LoRA(2, init="svd"), "init"),
        (lambda: lrjax.LoRAXS(0), "LoRAXS needs a rank of at least 1"),
        (lambda: lrjax.VeRA(True), "VeRA needs a rank of at least 1"),
        (lambda: lrjax.TiedLoRA(2, dropout=1.0), "TiedLoRA's dropout must be in"),
    ],
)
def test_bad_settings_are_refused(make, message):
    # Of a wrong word the tests' runtime type checker may be the first to complain.
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_more_singular_vectors_than_there_are_are_refused(getkey):
    for kind in (lrjax.LoRAXS(6), lrjax.LoRA(6, init="pissa")):
        with pytest.raises(ValueError, match=r"the root \(7, 5\) has 5 of them"):
            lrjax.adapt(linear(getkey), kind, key=getkey())


def test_numpy_ranks_are_ranks():
    assert lrjax.LoRA(np.int64(8)).rank == 8
