"""Sums over inputs and gradients of layers, against the same without lrjax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import tower
from tests.helpers import assert_close, tol
from tests.reference import inits as reference


PATHS = [
    "embedding",
    "blocks.attention.query_proj",
    "blocks.attention.output_proj",
    "blocks.up",
    "blocks.down",
    "head",
]


def call(model, tokens):
    return jax.vmap(model)(tokens)


def loss(model, tokens):
    return jnp.mean(call(model, tokens) ** 2)


@eqx.filter_jit
def inputs_of(model, tokens):
    """What the layers of a tower are called with, block after block."""
    x = jax.vmap(jax.vmap(model.embedding))(tokens)
    seen = {"blocks.attention.query_proj": [], "blocks.up": [], "blocks.down": []}
    rows = lambda x: x.reshape(-1, x.shape[-1])
    for i in range(3):
        block = jax.tree.map(lambda a, i=i: a[i] if eqx.is_array(a) else a, model.blocks)
        seen["blocks.attention.query_proj"].append(rows(x))
        x = x + jax.vmap(block.attention)(x, x, x)
        seen["blocks.up"].append(rows(x))
        hidden = jax.nn.gelu(jax.vmap(jax.vmap(block.up))(x))
        seen["blocks.down"].append(rows(hidden))
        x = x + jax.vmap(jax.vmap(block.down))(hidden)
    seen = {path: jnp.stack(each) for path, each in seen.items()}
    seen["head"] = jnp.mean(x, axis=1)
    seen["embedding"] = jax.nn.one_hot(tokens.reshape(-1), 11)
    return seen


@pytest.fixture(scope="module")
def seen():
    """A tower, three batches of four sequences, and the statistics of both kinds."""
    key = jr.key(1)
    model, batches = tower(key), jr.randint(jr.fold_in(key, 1), (3, 4, 6), 0, 11)
    both = [
        room.activation_statistics(
            call, model, batches, where=PATHS, rank=rank, key=jr.key(3)
        )
        for rank in (None, 5)
    ]
    return model, batches, *both


@pytest.mark.slow
def test_sums_are_those_of_the_inputs(seen):
    """In a scan, in attention, under vmap, of an embedding and of a head."""
    model, batches, whole, sketch = seen
    assert set(whole) == set(PATHS)
    inputs = jax.tree.map(np.asarray, inputs_of(model, batches.reshape(-1, 6)))
    for path, rows in inputs.items():
        count = np.full(rows.shape[:-2], rows.shape[-2], np.float32)
        moment = rows.swapaxes(-2, -1) @ rows
        got = whole[path]
        # Of a lookup the diagonal is kept alone, which is the total.
        kept = None if path == "embedding" else moment
        want = (kept, rows.sum(-2), np.sum(rows**2, (-2, -1)), count)
        assert_close((got.image, got.total, got.energy, got.count), want, condition=100)
        thin = sketch[path]
        probe = np.asarray(thin.probe)
        assert_close(thin.image, moment @ probe, condition=100)
        assert_close(thin.energy, got.energy, condition=10)
        gram = probe.swapaxes(-2, -1) @ probe
        eye = np.eye(probe.shape[-1], dtype=np.float32)
        assert_close(gram, np.broadcast_to(eye, gram.shape), condition=10)


@pytest.mark.slow
def test_statistics_of_parts_add_up(seen):
    model, batches, whole, sketch = seen
    for rank, want in ((None, whole), (5, sketch)):
        parts = [
            room.activation_statistics(
                call, model, part, where=PATHS, rank=rank, key=jr.key(3)
            )
            for part in (batches[:1], batches[1:])
        ]
        for path in PATHS:
            assert_close(parts[0][path] + parts[1][path], want[path], condition=100)
    with pytest.raises(ValueError, match="not of one layer"):
        whole["head"] + sketch["head"]


def test_principal_directions_and_variances(seen):
    model, batches, whole, sketch = seen
    rows = np.asarray(inputs_of(model, batches.reshape(-1, 6))["blocks.up"][1], float)
    one = lambda x: jnp.asarray(np.asarray(x)[1])
    pick = lambda statistics: jax.tree.map(one, statistics["blocks.up"])
    principal = jax.jit(lambda statistic: statistic.principal())
    values, vectors = principal(pick(whole))
    directions, shares = reference.eva(rows, 8)
    variance = np.asarray(pick(whole).variance())
    assert_close(np.asarray(values) / variance, jnp.asarray(shares), condition=1e3)
    centred = rows - rows.mean(axis=0)
    captured = lambda basis: np.sum((centred @ np.asarray(basis)) ** 2)
    np.testing.assert_allclose(
        captured(np.asarray(vectors)[:, :3]), captured(directions[:3].T), rtol=1e-4
    )
    # Those of a sketch capture less, but more than the sketch itself, which is at random.
    rough = np.asarray(principal(pick(sketch))[1])
    assert_close(rough.T @ rough, np.eye(5, dtype=np.float32), condition=1e2)
    best = captured(np.asarray(vectors)[:, :5])
    assert captured(pick(sketch).probe) < captured(rough) < best * (1 + 1e-4)


def test_patches_of_a_convolution(getkey):
    """Groups, strides and padding: every group sees its patches, flattened like kernels."""
    conv = eqx.nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, groups=2, key=getkey())
    images = jr.normal(getkey(), (2, 5, 4, 5, 6))
    got = room.activation_statistics(
        lambda conv, x: jax.vmap(conv)(x), conv, images, where=[""]
    )[""]
    rows = []
    for image in np.asarray(images, float).reshape(10, 4, 5, 6):
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
        for group in (padded[:2], padded[2:]):
            rows += [
                group[:, i : i + 2, j : j + 3].ravel()
                for i in range(0, 6, 2)
                for j in range(0, 6, 2)
            ]
    rows = np.stack(rows)
    assert int(got.count) == len(rows)
    assert_close(got.image, jnp.asarray(rows.T @ rows), condition=100)
    assert_close(got.total, jnp.asarray(rows.sum(0)), condition=1e3)
    assert_close(got.energy, jnp.asarray(np.sum(rows**2)), condition=10)


@pytest.mark.slow
def test_the_sensitivity_is_that_of_the_output(getkey):
    """Of one output for each input the signs cancel: Σ g gᵀ of its own gradients."""
    first = eqx.nn.Conv1d(2, 3, 2, key=getkey())
    model = {"conv": first, "head": eqx.nn.Linear(12, 1, key=getkey())}
    rest = lambda head, y: head(jnp.tanh(y).reshape(-1))
    run = lambda model, x: rest(model["head"], model["conv"](x))
    batches = jr.normal(getkey(), (2, 7, 2, 5))
    found = room.activation_statistics(
        lambda model, x: jax.vmap(lambda x: run(model, x))(x),
        model,
        batches,
        where=["conv", "head"],
        sensitivity=True,
        key=getkey(),
    )
    x = batches.reshape(14, 2, 5)
    slope = jax.grad(lambda y: rest(model["head"], y)[0])
    g = np.asarray(jax.jit(lambda x: jax.vmap(slope)(jax.vmap(first)(x)))(x))
    want = np.einsum("bmp,bnp->mn", g, g)
    assert_close(found["conv"].sensitivity, want, condition=100)
    assert_close(found["head"].sensitivity, jnp.full((1, 1), 14.0), condition=10)


def test_batches_that_a_mesh_shards(getkey):
    """Explicit meshes give the sum over all; in ``shard_map`` that is left to ``psum``."""
    layer, x = eqx.nn.Linear(6, 3, key=getkey()), jr.normal(getkey(), (16, 6))
    statistics = lambda x: room.activation_statistics(call, layer, [x])[""]
    want = statistics(x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        assert_close(jax.device_get(statistics(cut)), want, condition=10)
    parts = jax.shard_map(
        lambda x: jax.lax.psum(statistics(x), "data"),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=jax.P("data"),
        out_specs=jax.P(),
        check_vma=False,
    )
    assert_close(jax.jit(parts)(x), want, condition=10)


@pytest.mark.slow
def test_nystrom_is_exact_on_low_rank_and_never_above(getkey):
    root = jr.normal(getkey(), (9, 3))
    c = root @ root.T
    probe = lrjax.linalg.orthonormalize(jr.normal(getkey(), (9, 5)))
    values, vectors = lrjax.linalg.nystrom(c @ probe, probe)
    assert_close((vectors * values[None]) @ vectors.T, c, condition=1e4)
    assert_close(vectors.T @ vectors, jnp.eye(5), condition=10)
    full = c + jnp.diag(jnp.arange(1.0, 10.0))
    values, vectors = lrjax.linalg.nystrom(full @ probe, probe)
    below = np.linalg.eigvalsh(full - (vectors * values[None]) @ vectors.T)
    assert below.min() > -tol(full, condition=10) * float(jnp.linalg.norm(full))
    for zero in lrjax.linalg.nystrom(0 * probe, probe):
        assert np.all(np.isfinite(zero))


@pytest.fixture(scope="module")
def gradients(seen):
    model, batches, *_ = seen
    sketch = {"rank": 5, "power_iters": 2, "key": jr.key(6)}
    return [
        room.gradient_statistics(loss, model, batches, where=PATHS, **settings)
        for settings in ({}, sketch)
    ]


@pytest.mark.slow
def test_gradients_are_those_of_the_model(seen, gradients):
    model, batches, *_ = seen
    whole, thin = gradients
    tree = eqx.filter_jit(eqx.filter_grad(loss))(model, batches.reshape(-1, 6))
    leaves = {
        "embedding": tree.embedding.weight.T,
        "blocks.up": tree.blocks.up.weight,
        "head": tree.head.weight,
        "blocks.attention.query_proj": tree.blocks.attention.query_proj.weight,
    }
    for path, want in leaves.items():
        assert_close(whole[path], want, condition=1e3)
    # The head has three rows: factors as wide are all of it. Five columns of others beat
    # the best three.
    assert thin["head"].rank == 3
    for path, one in thin.items():
        values = np.linalg.svd(np.asarray(whole[path], float), compute_uv=False)
        best = np.sqrt(np.sum(values[..., 3:] ** 2, axis=-1))
        dense = np.asarray(one.left) @ np.asarray(one.right).swapaxes(-2, -1)
        error = np.linalg.norm(dense - np.asarray(whole[path]), axis=(-2, -1))
        size = np.linalg.norm(values, axis=-1)
        assert np.all(error < best + 1e-4 * size)


@pytest.mark.slow
def test_what_cannot_be_seen_is_refused(getkey):
    model = {"a": eqx.nn.Linear(3, 3, key=getkey()), "b": jnp.ones((3, 3))}
    x = jr.normal(getkey(), (2, 3))
    run = lambda model, x: jax.lax.stop_gradient(model["a"](x)) + model["b"] @ x
    statistics = room.activation_statistics
    with pytest.raises(ValueError, match=r"No inputs were seen at \['a'\]"):
        statistics(run, model, x)
    with pytest.raises(ValueError, match="b is an array that other code reads"):
        statistics(run, model, x, where=["b"])
    with pytest.raises(ValueError, match="activation_statistics was given no batches"):
        statistics(run, model, [])
    with pytest.raises(ValueError, match="pass key="):
        statistics(run, model, x, rank=2)
    of = lambda model, x: jnp.sum(run(model, x))
    with pytest.raises(ValueError, match="pass key="):
        room.gradient_statistics(of, model, x, rank=2)
    with pytest.raises(ValueError, match="got an iterator"):
        room.gradient_statistics(of, model, iter(x), rank=2, key=getkey())
    thin = statistics(lambda m, x: m["a"](x), model, x, rank=2, key=getkey())["a"]
    with pytest.raises(ValueError, match="does not hold their whole second moment"):
        thin.second_moment()


def uneven(shares):
    """A statistic of centred inputs whose directions explain these shares."""
    image, one = jnp.diag(jnp.asarray(shares)), jnp.ones(())
    return room.InputStatistic(image, jnp.zeros(len(shares)), one, one)


@pytest.mark.slow
def test_ranks_go_where_the_variance_is():
    statistics = {
        "peaked": uneven([0.9, 0.06, 0.04, 0.0]),
        "flat": uneven([0.25, 0.25, 0.25, 0.25]),
        "stack": jax.tree.map(
            lambda *xs: jnp.stack(xs), uneven([0.5, 0.3, 0.2]), uneven([0.4, 0.32, 0.28])
        ),
    }
    # The shares in order: .9, then .5, .4, .32, .3 and .28 in the stack, .25 four times.
    one = room.ranks_by_variance(statistics, 1)
    assert one == {"peaked": 1, "stack": [1, 2]}
    two = room.ranks_by_variance(statistics, 2)
    assert two == {"peaked": 1, "flat": 2, "stack": [2, 3]}
    capped = room.ranks_by_variance(statistics, 2, max_factor=1.0)
    assert capped == {"peaked": 2, "flat": 2, "stack": [2, 2]}
    with pytest.raises(ValueError, match="max_factor of at least 1"):
        room.ranks_by_variance(statistics, 2, max_factor=0.5)
    thin = room.InputStatistic(
        jnp.ones((4, 2)), jnp.zeros(4), jnp.ones(()), jnp.ones(()), jnp.eye(4, 2)
    )
    with pytest.raises(ValueError, match="width of 2"):
        room.ranks_by_variance({"thin": thin}, 2)
