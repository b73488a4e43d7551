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


@pytest.mark.parametrize(("over", "dim"), [("product", "step"), ("zip", "member")])
def test_a_single_name(over, dim):
    run = lambda target, *, step: descend(target, step=step, start=3.0)
    out = lrjax.sweep(run, {"step": GRID["step"]}, TARGET, over=over, progress=False)
    assert out["x"].dims == (dim, "x_0")
    assert out["losses"].dims == (dim, "losses_0")
    assert out["step"].dims == (dim,)
    np.testing.assert_allclose(out["step"], GRID["step"])
    np.testing.assert_allclose(out["x"][1], run(TARGET, step=0.5)["x"], rtol=1e-6)


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


@pytest.mark.slow
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


def draw(*, rank, scale, seed=0):
    """A result whose program depends on the rank, but not its shape."""
    return {"size": scale * jnp.sum(jr.normal(jr.key(seed), (rank, 3)) ** 2)}


def test_static_values_decide_shapes_and_take_one_compilation_each():
    traces = []

    def run(*, rank, scale):
        traces.append(rank)
        return draw(rank=rank, scale=scale)

    grid, static = {"scale": [1.0, 2.0, 3.0]}, {"rank": [4, 8]}
    for _ in range(2):
        out = lrjax.sweep(run, grid, static=static, batch_size=2, progress=False)
    assert traces == [4, 8]
    assert out["size"].dims == ("rank", "scale")
    assert out["rank"].values.tolist() == [4, 8]
    for rank in (4, 8):
        for scale in (1.0, 2.0, 3.0):
            got = out["size"].sel(rank=rank, scale=scale)
            want = draw(rank=rank, scale=scale)["size"]
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_static_values_zipped_with_others_share_programs():
    traces = []

    def run(*, rank, scale):
        traces.append(rank)
        return draw(rank=rank, scale=scale)["size"]

    scales, ranks = [1.0, 2.0, 3.0, 4.0, 5.0], [4, 8, 4, 4, 8]
    out = lrjax.sweep(
        run, {"scale": scales}, static={"rank": ranks}, over="zip", progress=False
    )
    assert traces == [4, 8]
    assert out["rank"].dims == ("member",)
    want = [draw(rank=r, scale=s)["size"] for r, s in zip(ranks, scales, strict=True)]
    np.testing.assert_allclose(out["result"], want, rtol=1e-6)


def test_static_values_alone_by_name_and_as_functions():
    run = lambda x, *, how, rank: how(x) if rank else jnp.max(x)
    static = {"how": [jnp.sum, jnp.max], "rank": np.array([0, 1])}
    out = lrjax.sweep(run, {}, TARGET, static=static, progress=False)
    assert out["how"].values.tolist() == ["sum", "max"]
    assert out["result"].values.tolist() == [[1.0, -1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("run", "static", "message"),
    [
        (
            lambda *, rank, scale: scale * jnp.ones(rank),
            {"rank": [4, 8]},
            r"'result' is float32\[4\] for {'rank': 4} and float32\[8\] for {'rank': 8}",
        ),
        (
            lambda *, rank, scale: {f"at{rank}": scale},
            {"rank": [4, 8]},
            "float32.* and missing|missing .* and float32",
        ),
        (draw, {"rank": [[4], [8]]}, r"must be hashable.*'rank' has \[4\]"),
        (draw, {"rank": 4}, "must be a list"),
        (draw, {"rank": []}, "must be a list that is not empty"),
        (draw, {"rank": "48"}, "must be a list"),
        (draw, {"scale": [1.0]}, "in the grid and in static"),
    ],
)
def test_static_values_are_refused(run, static, message):
    with pytest.raises(ValueError, match=message):
        lrjax.sweep(run, {"scale": [1.0]}, static=static, progress=False)


def test_an_error_in_tracing_names_the_static_values():
    def run(*, rank, scale):
        return scale * jnp.ones((2, 2)).reshape(rank, -1)

    with pytest.raises(TypeError) as caught:
        lrjax.sweep(run, {"scale": [1.0]}, static={"rank": [1, 3]}, progress=False)
    assert any("'rank': 3" in note for note in caught.value.__notes__)


def test_reductions_over_seeds_are_those_of_xarray():
    grid = {"scale": [1.0, 2.0], "seed": range(16)}
    runs = lrjax.sweep(draw, grid, static={"rank": [4, 8]}, progress=False)["size"]
    mean, error = runs.mean("seed"), runs.std("seed", ddof=1) / runs.sizes["seed"] ** 0.5
    one = [float(draw(rank=8, scale=2.0, seed=seed)["size"]) for seed in range(16)]
    at = {"rank": 8, "scale": 2.0}
    np.testing.assert_allclose(mean.sel(at), np.mean(one), rtol=1e-5)
    np.testing.assert_allclose(error.sel(at), np.std(one, ddof=1) / 4, rtol=1e-4)


def test_half_precision_becomes_single():
    run = lambda *, a: {"brain": a.astype(jnp.bfloat16), "half": a.astype(jnp.float16)}
    out = lrjax.sweep(run, {"a": [1.0, 2.0]}, progress=False)
    assert (out["brain"].dtype, out["half"].dtype) == (np.float32, np.float16)
    assert out["brain"].values.tolist() == out["half"].values.tolist() == [1.0, 2.0]
