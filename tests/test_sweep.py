import builtins

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax


def descend(target, *, step, start):
    """Twenty gradient steps on a square; diverges for step > 2."""

    def body(x, _):
        return x - step * (x - target), jnp.sum((x - target) ** 2)

    x, losses = jax.lax.scan(body, jnp.full_like(target, start), length=20)
    return {"x": x, "losses": losses}


TARGET = jnp.array([1.0, -2.0])
GRID = {"step": [0.1, 0.5, 1.0], "start": [0.0, 3.0]}


def test_product_equals_the_loop():
    out = lrjax.sweep(descend, GRID, TARGET, progress=False)
    assert out["x"].dims == ("step", "start", "x_0")
    assert out["losses"].shape == (3, 2, 20)
    for step in GRID["step"]:
        for start in GRID["start"]:
            one = descend(TARGET, step=step, start=start)
            got = out.sel(step=np.float32(step), start=start)
            np.testing.assert_allclose(got["x"], one["x"], rtol=1e-6)
            np.testing.assert_allclose(got["losses"], one["losses"], rtol=1e-5, atol=1e-6)


def test_zip_runs_the_values_together():
    grid = {"step": [0.1, 0.5], "start": [0.0, 3.0]}
    out = lrjax.sweep(descend, grid, TARGET, over="zip", progress=False)
    assert out["x"].dims == ("member", "x_0")
    assert out["start"].values.tolist() == [0.0, 3.0]
    one = descend(TARGET, step=0.5, start=3.0)
    np.testing.assert_allclose(out["x"][1], one["x"], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 6, 100])
def test_chunks_change_nothing(batch_size):
    whole = lrjax.sweep(descend, GRID, TARGET, progress=False)
    chunked = lrjax.sweep(descend, GRID, TARGET, batch_size=batch_size, progress=False)
    np.testing.assert_allclose(chunked["losses"], whole["losses"], rtol=1e-6)


def test_one_compilation_serves_all_chunks_and_later_calls():
    traces = 0

    def run(*, scale):
        nonlocal traces
        traces += 1
        return scale**2

    grid = {"scale": np.arange(7.0)}
    lrjax.sweep(run, grid, batch_size=3, progress=False)
    out = lrjax.sweep(run, grid, batch_size=3, progress=False)
    assert traces == 1
    assert out["result"].values.tolist() == [0, 1, 4, 9, 16, 25, 36]


@pytest.mark.parametrize("members", [8, 13])
def test_a_mesh_spreads_the_members(members):
    mesh = jax.make_mesh((8,), ("members",))
    grid = {"step": np.linspace(0.1, 1.0, members), "start": [0.5]}
    plain = lrjax.sweep(descend, grid, TARGET, progress=False)
    spread = lrjax.sweep(descend, grid, TARGET, mesh=mesh, progress=False)
    np.testing.assert_allclose(spread["losses"], plain["losses"], rtol=1e-6)


def test_a_diverging_member_leaves_the_others_as_they_were():
    def run(data, *, step):
        def body(x, _):
            return x - step * jnp.linalg.solve(data, x**3), None

        return jax.lax.scan(body, jnp.ones(3), length=40)[0]

    data = jnp.eye(3) * 2
    good = lrjax.sweep(run, {"step": [0.1, 0.2, 0.3]}, data, progress=False)
    mixed = lrjax.sweep(run, {"step": [0.1, 1e6, 0.3]}, data, progress=False)
    assert not np.isfinite(mixed["result"][1]).any()
    for i in (0, 2):
        np.testing.assert_array_equal(mixed["result"][i], good["result"][i])


def test_seeds_and_keys_on_the_grid():
    draw = lambda *, seed: jr.normal(jr.key(seed))
    by_seed = lrjax.sweep(draw, {"seed": np.arange(4)}, progress=False)
    keys = jax.vmap(jr.key)(jnp.arange(4))
    by_key = lrjax.sweep(lambda *, key: jr.normal(key), {"key": keys}, progress=False)
    np.testing.assert_array_equal(by_seed["result"], by_key["result"])
    assert by_key["key"].values.tolist() == [0, 1, 2, 3]


def test_a_model_with_functions_in_it_may_be_shared():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jr.key(0))
    run = lambda model, x, *, scale: scale * model(x)
    out = lrjax.sweep(run, {"scale": [1.0, 3.0]}, model, TARGET, progress=False)
    np.testing.assert_allclose(out["result"][1], 3 * model(TARGET), rtol=1e-6)


def test_nested_results_are_named_by_their_path():
    run = lambda *, a: {"fit": lrjax.LowRank(a * jnp.ones((3, 1)), jnp.ones((2, 1)))}
    out = lrjax.sweep(run, {"a": [1.0, 2.0]}, progress=False)
    assert set(out.data_vars) == {"fit.left", "fit.right"}


def test_progress_bar_counts_members(capsys):
    lrjax.sweep(descend, GRID, TARGET, batch_size=2)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ({}, {}, "empty grid"),
        ({"step": 0.1, "start": [0.0]}, {}, "'step' must be one-dimensional"),
        ({"step": [0.1, 0.2], "start": [0.0]}, {"over": "zip"}, "one length"),
        (GRID, {"over": "random"}, "'product' or 'zip'"),
        (GRID, {"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_input(grid, options, message):
    # The annotation of `over` is checked first in tests; the message is for users.
    error = Exception if options.get("over") == "random" else ValueError
    with pytest.raises(error, match=None if error is Exception else message):
        lrjax.sweep(descend, grid, TARGET, progress=False, **options)


def test_a_missing_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without_xarray(name, *args, **kwargs):
        if name == "xarray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", lambda name: without_xarray(name))
    with pytest.raises(ImportError, match=r"lrjax\[sweep\]"):
        lrjax.sweep(descend, GRID, TARGET, progress=False)
