"""Parameters out of a few numbers, beside the projection as a matrix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank, relative_error


KINDS = ("fastfood", "dense", "sparse")
kinds = pytest.mark.parametrize("kind", KINDS)


def params_of(key, dtype=jnp.float32):
    return {
        "w": jr.normal(key, (30, 20), dtype),
        "pair": random_low_rank(key, 12, 9, 3, dtype=dtype),
        "b": jnp.ones(37, dtype),
        "steps": jnp.array(3),
        "none": None,
    }


def flat(tree):
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.concatenate([x.ravel() for x in leaves])


@jax.jit
def columns(subspace):
    """P, column by column."""
    start = flat(subspace.start)
    return jax.vmap(lambda x: flat(subspace(x)) - start, out_axes=1)(jnp.eye(subspace.dim))


@pytest.mark.slow_but("dense")
@kinds
def test_columns_have_norm_one_over_the_whole_model(getkey, x64, kind):
    params = params_of(getkey(), jnp.float64)
    p = np.asarray(columns(lrjax.random_subspace(params, 40, kind=kind, key=getkey())))
    size = len(p)
    assert size == 30 * 20 + 12 * 3 + 9 * 3 + 37
    norms = np.linalg.norm(p, axis=0)
    if kind == "fastfood":
        assert abs(norms - 1).max() < 5 / size**0.5
    else:
        assert abs(norms - 1).max() < 1e-12
    # Columns are nearly orthogonal, and every leaf has its share of each.
    overlaps = p.T @ p - np.diag(norms**2)
    assert abs(overlaps).max() < 7 / size**0.5
    share = np.linalg.norm(p[:600]) ** 2 / np.linalg.norm(p) ** 2
    assert abs(share - 600 / size) < 0.1
    if kind == "sparse":
        assert (np.count_nonzero(p, axis=0) == np.ceil(size**0.5)).all()


@pytest.mark.slow
@kinds
def test_it_is_linear_and_its_gradient_is_the_transpose(getkey, x64, kind):
    params = params_of(getkey(), jnp.float64)
    subspace = lrjax.random_subspace(params, 7, kind=kind, key=getkey())
    p = columns(subspace)
    x = jr.normal(getkey(), (7,), jnp.float64)
    new, back = jax.vjp(lambda x: flat(subspace(x)), x)
    assert_close(new, flat(params) + p @ x, condition=10)
    y = jr.normal(getkey(), new.shape, jnp.float64)
    assert_close(back(y)[0], p.T @ y, condition=10)
    assert_close(flat(subspace(jnp.zeros(7))), flat(params))
    # Fewer dimensions are the first columns: one program for all of them.
    cut = jax.vmap(lambda d: flat(subspace(jnp.where(jnp.arange(7) < d, x, 0))))
    want = [flat(params) + p[:, :d] @ x[:d] for d in (1, 4)]
    assert_close(cut(jnp.array([1, 4])), jnp.stack(want), condition=10)


@pytest.mark.slow
@kinds
def test_seeds_are_a_batch(getkey, kind):
    params, x = params_of(getkey()), jr.normal(getkey(), (3, 5))
    keys = jr.split(getkey(), 3)
    made = lambda key: lrjax.random_subspace(params, 5, kind=kind, key=key).projection

    def moved(key, x):
        return flat(lrjax.random_subspace(params, 5, kind=kind, key=key)(x))

    together = jax.jit(jax.vmap(moved))(keys, x)
    want = jnp.stack([moved(key, x) for key, x in zip(keys, x, strict=True)])
    assert_close(together, want, condition=10)
    assert all(jnp.any(a[0] != a[1]) for a in jax.tree.leaves(jax.vmap(made)(keys)))


@pytest.mark.slow
@kinds
def test_a_model_stays_a_model(getkey, kind):
    model = eqx.nn.MLP(3, 2, 8, 1, dtype=jnp.bfloat16, key=getkey())
    subspace = lrjax.random_subspace(model, 4, kind=kind, key=getkey())
    new = eqx.filter_jit(lambda s, x: s(x))(subspace, 10 * jnp.ones(4))
    assert jax.tree.structure(new) == jax.tree.structure(model)
    assert new.layers[0].weight.dtype == jnp.bfloat16
    assert bool(jnp.any(new.layers[0].weight != model.layers[0].weight))
    assert bool(jnp.all(jnp.isfinite(new(jnp.ones(3, jnp.bfloat16)))))


def test_all_dimensions_reach_what_a_model_reaches(getkey, x64):
    """With dim = D any parameters are in the subspace: least squares has no rest."""
    params = {"w": jnp.zeros((4, 4), jnp.float64)}
    p = columns(lrjax.random_subspace(params, 16, kind="dense", key=getkey()))
    target = jr.normal(getkey(), (16,), jnp.float64)
    x = np.linalg.lstsq(np.asarray(p), np.asarray(target), rcond=None)[0]
    assert relative_error(p @ x, target) < 1e-9


def test_numbers_of_another_shape_are_refused():
    subspace = lrjax.random_subspace({"w": jnp.ones(9)}, 2, key=jr.key(0))
    with pytest.raises(ValueError, match=r"takes 2 numbers, got shape \(3,\)"):
        subspace(jnp.zeros(3))


@pytest.mark.parametrize(
    ("params", "dim", "kind", "says"),
    [
        ({"w": jnp.ones(3)}, 4, "dense", "between 1 and the 3 parameters, got 4"),
        ({"w": jnp.ones(3)}, 0, "sparse", "between 1 and the 3 parameters, got 0"),
        ({"w": jnp.ones(3)}, 2, "hash", r"one of \['dense', 'sparse', 'fastfood'\]"),
        ({"w": jnp.ones(3, int)}, 1, "dense", "no floating-point array"),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_refusals(params, dim, kind, says):
    with pytest.raises(ValueError, match=says):
        lrjax.random_subspace(params, dim, kind=kind, key=jr.key(0))


# The principal components of a run -----------------------------------------------------


def run_of(key, steps, rank, dtype):
    """Snapshots of parameters that move along ``rank`` directions, and those directions."""
    k_start, k_moves, k_times = jr.split(key, 3)
    start = params_of(k_start, dtype)
    numbers, rest = eqx.partition(start, eqx.is_inexact_array)
    leaves, treedef = jax.tree.flatten(numbers)
    keys = jr.split(k_moves, len(leaves))
    times = jr.normal(k_times, (steps, rank), dtype).at[0].set(0)
    times = times * 2.0 ** -jnp.arange(rank)[None]
    stacked = [
        x[None] + jnp.tensordot(times, jr.normal(k, (rank, *x.shape), dtype), 1)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return start, eqx.combine(treedef.unflatten(stacked), rest)


def rows(snapshots, count):
    at = lambda i: jax.tree.map(lambda x: x[i] if eqx.is_inexact_array(x) else x, snapshots)
    return np.stack([np.asarray(flat(at(i))) for i in range(count)])


@pytest.mark.slow
def test_columns_are_the_principal_components_of_a_run(getkey, x64):
    start, snapshots = jax.jit(run_of, static_argnums=(1, 2, 3))(
        getkey(), 9, 8, jnp.float64
    )
    subspace = lrjax.trajectory_subspace(snapshots, 4)
    x = rows(snapshots, 9)
    v = np.linalg.svd(x - x.mean(0))[2][:4]
    p = np.asarray(columns(subspace))
    np.testing.assert_allclose(np.abs(np.sum(p.T * v, 1)), 1, rtol=1e-9)
    np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-9)
    assert_close(subspace(jnp.zeros(4)), start)  # the first snapshot


@pytest.mark.slow
def test_a_run_of_few_directions_is_within_them(getkey, x64):
    """From the first snapshot to the last: and what is asked for beyond is zero."""
    start, snapshots = jax.jit(run_of, static_argnums=(1, 2, 3))(
        getkey(), 9, 3, jnp.float64
    )
    other = jax.tree.map(lambda x: x + 1 if eqx.is_inexact_array(x) else x, start)
    subspace = lrjax.trajectory_subspace(snapshots, 5, start=other)
    p = np.asarray(columns(subspace))
    assert (np.linalg.norm(p, axis=0) > 0.5).tolist() == [True] * 3 + [False] * 2
    moves = rows(snapshots, 9) - rows(snapshots, 1)
    assert relative_error(moves @ p @ p.T, moves) < 1e-9
    assert_close(subspace(jnp.zeros(5)), other)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: lrjax.trajectory_subspace({"a": x, "b": x[1:]}, 1), "of one length"),
        (lambda x: lrjax.trajectory_subspace(x[0, 0], 1), "of one length"),
        (lambda x: lrjax.trajectory_subspace(x, 4), "between 1 and 3"),
        (lambda x: lrjax.trajectory_subspace(x, 1, start=x), "the arrays of one snapshot"),
    ],
)
def test_runs_that_are_none_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(jnp.ones((4, 3)))
