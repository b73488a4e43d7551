import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lrjax
from lrjax import recovery
from lrjax.recovery.separation.augmented_lagrangian import Parts
from lrjax.recovery.separation.held_out import certain

from ..helpers import all_finite, assert_close, with_spectrum


M, N, RANK = 120, 100, 3
jitted = jax.jit(lrjax.fit_robust_pca, static_argnames=("rank", "max_steps"))


def fit(matrix, mask=None, tol=1e-6, **options):
    """One program, with gaps or without."""
    mask = np.ones(matrix.shape, bool) if mask is None else mask
    return jitted(matrix, mask=mask, tol=tol, **options)


@jax.jit
def problem(seed=0, observed=0.9):
    return lrjax.robust_pca(
        jr.key(seed), (M, N), RANK, 0.08, observed=observed, condition=10.0
    )


@pytest.mark.parametrize("seed", range(5))
def test_recovers_with_nothing_known(seed):
    p = problem(seed)
    result = fit(p.targets, mask=p.operator.mask)
    assert float(p.relative_error(result.low_rank)) < 1e-4
    assert int(result.rank) == RANK
    assert float(result.residual) <= 1e-6
    observed = jnp.where(p.operator.mask, p.targets - p.truth.materialize(), 0)
    assert_close(result.sparse, observed, rtol=1e-4)


@pytest.mark.slow
def test_a_known_rank_gives_the_same_matrix():
    p = problem()
    result = fit(p.targets, mask=p.operator.mask, rank=RANK)
    assert result.low_rank.rank == RANK
    assert float(p.relative_error(result.low_rank)) < 1e-4


@pytest.mark.slow
def test_the_transpose_gives_the_transpose():
    p = problem()
    tall = fit(p.targets, mask=p.operator.mask)
    wide = fit(p.targets.T, mask=p.operator.mask.T)
    assert_close(wide.low_rank.T.materialize(), tall.low_rank.materialize(), rtol=1e-5)
    assert_close(wide.sparse.T, tall.sparse, rtol=1e-5)
    gram = wide.low_rank.right.T @ wide.low_rank.right
    used = jnp.diag((jnp.arange(gram.shape[0]) < wide.rank).astype(gram.dtype))
    assert_close(gram, used, rtol=1e-4)


def test_the_scale_of_the_data_does_not_matter():
    p = problem()
    want = fit(p.targets, mask=p.operator.mask).low_rank.materialize()
    for scale in (1e-6, 1e6):
        got = fit(scale * p.targets, mask=p.operator.mask).low_rank.materialize()
        assert_close(got / scale, want, rtol=1e-5)


@pytest.mark.parametrize("power", [100, -100])
def test_a_power_of_two_as_unit_changes_no_bit(power):
    p = problem()
    scale = 2.0**power
    want = fit(p.targets, mask=p.operator.mask)
    got = fit(scale * p.targets, mask=p.operator.mask)
    assert jnp.array_equal(got.low_rank.left, scale * want.low_rank.left)
    assert jnp.array_equal(got.low_rank.right, want.low_rank.right)
    assert jnp.array_equal(got.sparse, scale * want.sparse)
    assert got.trusted
    assert got.held_out_error == want.held_out_error


@pytest.mark.slow
def test_several_matrices_at_once():
    problems = [problem(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    run = jax.vmap(lambda y, mask: lrjax.fit_robust_pca(y, mask=mask))
    batch = jax.jit(run)(stacked.targets, stacked.operator.mask)
    for k, p in enumerate(problems):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], batch)
        assert float(p.relative_error(one.low_rank)) < 1e-4
        assert int(one.rank) == RANK


@pytest.mark.slow
def test_new_rows_with_gross_errors_and_missing_entries():
    p = problem()
    result = fit(p.targets, mask=p.operator.mask)
    rows = jr.normal(jr.key(1), (20, RANK)) @ p.truth.right.T
    errors = jr.bernoulli(jr.key(2), 0.1, rows.shape)
    corrupted = jnp.where(errors, rows + 10 * jnp.max(rows), rows)
    corrupted = jnp.where(jr.bernoulli(jr.key(3), 0.1, rows.shape), jnp.nan, corrupted)
    scores = result.transform(corrupted)
    assert_close(scores @ result.low_rank.right.T, rows, rtol=1e-3)
    with pytest.raises(ValueError, match=r"\(k, 100\)"):
        result.transform(rows[:, :7])


@pytest.mark.slow
def test_row_blocks_on_a_mesh_give_the_same_and_stay_where_they_are():
    p = problem()
    want = fit(p.targets, mask=p.operator.mask)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    blocks = NamedSharding(mesh, PartitionSpec("rows", None))
    matrix, mask = jax.device_put((p.targets, p.operator.mask), blocks)
    run = jitted.lower(matrix, mask=mask).compile()
    got = run(matrix, mask=mask)
    assert_close(got.low_rank.materialize(), want.low_rank.materialize(), rtol=1e-5)
    assert got.sparse.sharding.is_equivalent_to(blocks, 2)
    assert got.low_rank.left.sharding.is_equivalent_to(blocks, 2)
    # What the devices exchange is thin: no array of every row and column arises.
    text = run.as_text()
    assert "all-reduce" in text
    assert not re.search(rf"\[({M},{N}|{N},{M})\]", text)


@pytest.mark.slow
def test_batches_of_rows_give_the_matrix_of_all_rows():
    p = problem()
    whole = fit(p.targets, mask=p.operator.mask)
    batches = jnp.where(p.operator.mask, p.targets, jnp.nan).reshape(3, M // 3, N)

    def step(state, rows):
        state = state.update(rows)
        return state, state.sparse

    @jax.jit
    def two_sweeps(batches):
        first = lrjax.fit_robust_pca(batches[0], rank=8)
        last, sparse = jax.lax.scan(step, first, batches[1:])
        left = jax.lax.map(last.transform, batches)
        return first, last, sparse, left.reshape(M, -1)

    first, last, sparse, left = two_sweeps(batches)
    assert int(first.rank) == int(last.rank) == RANK
    assert last.low_rank.shape == (M // 3, N)
    got = left @ last.low_rank.right.T
    assert float(p.relative_error(lrjax.LowRank(left, last.low_rank.right))) < 1e-5
    assert_close(got, whole.low_rank.materialize(), rtol=1e-5)
    assert_close(last.values[:RANK], whole.values[:RANK], rtol=1e-5)
    assert_close(sparse.reshape(-1, N), whole.sparse[M // 3 :], rtol=1e-4)
    with pytest.raises(ValueError, match=r"update needs rows of shape \(k, 100\)"):
        last.update(batches[0][:, :7])


@pytest.mark.slow
def test_a_batch_with_a_new_direction_teaches_the_basis():
    left = jr.normal(jr.key(0), (80, 3)) * jnp.array([[1.0, 1.0, 0.0]])
    left = left.at[40:, 2].set(2 * jr.normal(jr.key(1), (40,)))
    clean = left @ jr.normal(jr.key(2), (3, 50))
    dirty = jnp.where(jr.bernoulli(jr.key(3), 0.05, clean.shape), 20.0, clean)
    old = fit(dirty[:40], rank=6)
    new = jax.jit(lambda f, rows: f.update(rows))(old, dirty[40:])
    assert (int(old.rank), int(new.rank)) == (2, 3)
    assert_close(new.low_rank.materialize(), clean[40:], rtol=1e-4)
    truth = jnp.linalg.svd(clean, compute_uv=False)[:3]
    assert_close(new.values[:3], truth, rtol=1e-4)


DEGENERATE = {
    "a row of NaN": lambda y: y.at[3].set(jnp.nan),
    "a column of NaN": lambda y: y.at[:, 3].set(jnp.nan),
    "an infinite entry": lambda y: y.at[2, 5].set(jnp.inf),
    "a zero matrix": lambda y: 0 * y,
    "nothing observed": lambda y: jnp.full_like(y, jnp.nan),
    "a constant": lambda y: 0 * y + 7.5,
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_give_the_right_answer(name):
    p = problem(observed=0.999)
    data = DEGENERATE[name](p.targets)
    result = fit(data, mask=p.operator.mask)
    assert all_finite((result.low_rank, result.sparse, result.residual))
    got, truth = result.low_rank.materialize(), p.truth.materialize()
    if name in ("a zero matrix", "nothing observed"):
        assert float(jnp.abs(got).max()) == 0
        assert int(result.rank) == 0
    elif name == "a constant":
        assert int(result.rank) == 1
        assert_close(got, jnp.full_like(got, 7.5), rtol=1e-4)
        assert float(jnp.abs(result.sparse).max()) == 0
    else:  # what is not seen anywhere in a row or column stays zero
        truth = truth.at[3].set(0) if name == "a row of NaN" else truth
        truth = truth.at[:, 3].set(0) if name == "a column of NaN" else truth
        assert_close(got, truth, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (1, 1)])
def test_one_row_or_column_is_its_own_low_rank_part(shape):
    result = lrjax.fit_robust_pca(jnp.ones(shape))
    assert int(result.rank) == 1
    assert_close(result.low_rank.materialize(), jnp.ones(shape), rtol=1e-4)


@pytest.mark.slow
def test_any_rank_up_to_the_short_side():
    p = problem(observed=1.0)
    result = fit(p.targets[:60], rank=60)
    assert int(result.rank) == RANK
    assert_close(result.low_rank.materialize(), p.truth.materialize()[:60], rtol=1e-4)


@pytest.mark.slow
def test_integer_data_from_numpy():
    matrix = np.outer(np.arange(1, 31), np.arange(1, 21))
    want = jnp.asarray(matrix, jnp.float32)
    matrix[3, 4] = 5000
    result = lrjax.fit_robust_pca(matrix)
    assert int(result.rank) == 1
    assert_close(result.low_rank.materialize(), want, rtol=1e-5)
    assert int(jnp.sum(result.sparse != 0)) == 1
    assert_close(result.sparse[3, 4], 5000 - want[3, 4], rtol=1e-5)


@pytest.mark.slow
def test_rank_in_64_bits_reaches_the_rounding_error(x64):
    p = lrjax.robust_pca(jr.key(0), (60, 50), 2, 0.05, dtype=jnp.float64)
    result = fit(p.targets, rank=5, tol=1e-11)
    assert float(p.relative_error(result.low_rank)) < 1e-10
    assert int(result.rank) == 2


X = jnp.ones((6, 5))


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (X[0], {}, r"got shape \(5,\)"),
        (jnp.ones((2, 3, 4)), {}, r"jax\.vmap"),
        (jnp.ones((0, 4)), {}, r"got shape \(0, 4\)"),
        (X, {"rank": 6}, "rank must be between 1 and 5"),
        (X, {"rank": 0}, "rank must be between 1 and 5"),
        (X, {"mask": jnp.ones((5, 6), bool)}, "shape of the matrix"),
        (X, {"mask": X}, "mask must be boolean"),
        (X, {"mask": jnp.ones((6, 5), int)}, r"mask\.astype\(bool\)"),
        (X, {"errors": "lines"}, "'entries', 'rows', 'columns' or the shape"),
        (X, {"errors": (7, 1)}, r"block of a matrix \(6, 5\); got \(7, 1\)"),
    ],
)
def test_refuses(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        lrjax.fit_robust_pca(matrix, **options)


@pytest.mark.slow
def test_the_weight_is_that_of_pursuit_where_most_entries_are_missing(x64):
    """At 30 % observed, where the solution is not the truth and follows the weight."""
    p = recovery.robust_pca(jr.key(0), (40, 24), 3, 0.1, observed=0.3, dtype=jnp.float64)
    options = {"mask": p.operator.mask, "tol": 1e-7}
    exact = recovery.principal_component_pursuit(
        p.targets, penalty_growth=1.05, max_steps=300, **options
    ).low_rank.materialize()

    @jax.jit
    @jax.vmap
    def distance(weight):
        found = lrjax.fit_robust_pca(p.targets, nuclear_weight=weight, rank=24, **options)
        return jnp.linalg.norm(found.low_rank.materialize() - exact)

    # Pursuit's own weight, and two in which the observed share does not count as it should.
    same, without, squared = distance(jnp.array([1.0, 0.3**0.5, 0.3**-0.5]))
    assert same < 0.5 * min(without, squared)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rank"), [(5, 1), (30, 2)])
def test_a_singular_value_near_the_tolerance_is_no_rank(getkey, x64, size, rank):
    """5 · tol · σ₁ is not told from noise, 30 · tol · σ₁ is."""
    tol = 1e-4
    matrix = with_spectrum(getkey(), 40, 24, [100.0, size * tol * 100.0], jnp.float64)
    found = fit(matrix, rank=4, tol=tol)
    assert found.rank == rank
    assert found.converged
    assert jnp.count_nonzero(found.values) == rank


@pytest.mark.slow
def test_an_unfinished_fit_says_so():
    assert not lrjax.fit_robust_pca(problem().targets, max_steps=3).converged


@pytest.mark.parametrize("size", [10.0, 1e6])
@pytest.mark.parametrize("tol", [1e-6, 1e-9])
def test_the_size_of_the_errors_does_not_matter(getkey, size, tol):
    """The tolerance is relative to the clean part, and no lower than rounding."""
    clean = _low_rank(getkey(), (M, N), RANK)
    wrong = jr.bernoulli(getkey(), 0.05, clean.shape)
    dirty = jnp.where(wrong, size * jr.normal(getkey(), clean.shape), clean)
    found = fit(dirty, tol=tol)
    assert_close(found.low_rank.materialize(), clean, rtol=1e-5)
    assert found.rank == RANK
    assert found.trusted


@pytest.mark.slow
@pytest.mark.parametrize("constant", [False, True])
def test_what_no_method_recovers_is_not_trusted(getkey, constant):
    """At 60 % errors, and with nothing but noise."""
    clean = _low_rank(getkey(), (M, N), RANK)
    noise = jr.normal(getkey(), clean.shape)
    wrong = jr.bernoulli(getkey(), 0.6, clean.shape)
    spoiled = jnp.where(wrong, 5.0 if constant else 10 * noise, clean)
    for matrix in (spoiled, noise):
        found = fit(matrix)
        assert not found.trusted
        assert found.held_out_error > 0.1  # infinite beside a low-rank part of zero


@pytest.mark.slow
def test_a_direction_for_one_row_alone_proves_nothing(getkey):
    """The row is reproduced, errors and all, and the matrix has equal entries enough."""
    clean = _low_rank(getkey(), (60, 50), 2)
    spoiled = clean.at[7].set(jr.normal(getkey(), (50,)))

    def proven(matrix, rank, **options):
        u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
        sparse = jnp.where(jnp.indices(matrix.shape).sum(axis=0) % 10 == 0, 5.0, 0.0)
        vectors, basis = u[:, :rank], vt[:rank].T
        end = jnp.zeros(()), jnp.zeros((), int)
        parts = Parts(vectors, values[:rank], basis, sparse, *end)
        mask = jnp.ones(matrix.shape, bool)
        return certain(parts, matrix + sparse, mask, near=1e-4, **options)

    assert proven(clean, 2)
    assert not proven(spoiled, 3)
    assert proven(spoiled, 3, known=(jnp.arange(60) == 7)[:, None])
    assert proven(spoiled.T, 3, known=(jnp.arange(60) == 7)[None, :])


@pytest.mark.slow
def test_at_the_edge_of_what_pursuit_recovers_failures_are_not_trusted(getkey):
    """Rank 10 in 60×50, 7 % of the entries wrong: a third of the draws fail."""

    @jax.jit
    @jax.vmap
    def run(key):
        first, second, third = jr.split(key, 3)
        clean = _low_rank(first, (60, 50), 10) / 10**0.5
        wrong = jr.bernoulli(second, 0.07, clean.shape)
        error = 8 * jr.rademacher(third, clean.shape, clean.dtype)
        found = lrjax.fit_robust_pca(jnp.where(wrong, clean + error, clean), rank=30)
        gap = jnp.linalg.norm(found.low_rank.materialize() - clean)
        return gap / jnp.linalg.norm(clean), found.proven, found.trusted

    error, proven, trusted = run(jr.split(getkey(), 16))
    good = error < 1e-4
    assert good.sum() >= 4
    assert not jnp.any(proven & ~good)
    assert not jnp.any(trusted & (error > 0.1))  # what a prediction claims
    assert jnp.sum(good & ~trusted) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(M, N), (200, 100)])
def test_a_fifth_of_the_entries_may_be_wrong(getkey, shape):
    """Pursuit recovers all of these, and so does a fit that is told nothing."""
    rng = np.random.default_rng(getkey.seed)
    for _ in range(4):
        clean = _low_rank_of(rng, shape, RANK)
        size = np.abs(clean).max()
        wrong = rng.random(shape) < 0.2
        dirty = np.where(wrong, clean + rng.uniform(-size, size, shape), clean)
        found = fit(dirty.astype(np.float32))
        assert_close(found.low_rank.materialize(), clean.astype(np.float32), rtol=1e-4)
        assert found.trusted


@pytest.mark.slow
def test_the_width_grows_to_the_rank(getkey):
    """Where shapes are fixed the fit says that it did not suffice."""
    clean = _low_rank(getkey(), (250, 250), 45)
    wrong = jr.bernoulli(getkey(), 0.02, clean.shape)
    dirty = jnp.where(wrong, 50.0, clean)
    found = lrjax.fit_robust_pca(dirty)
    assert (found.low_rank.rank, int(found.rank)) == (80, 45)
    assert_close(found.low_rank.materialize(), clean, rtol=1e-5)
    assert found.trusted
    assert not fit(dirty).trusted


@pytest.mark.slow
def test_noise_beside_the_errors_is_noticed(getkey):
    """σ = .1 on entries of 1.5, one in twenty of them wrong: the error is the noise's."""
    shape, noise = (M, N), 0.1
    rng = np.random.default_rng(getkey.seed)
    for _ in range(4):
        clean = _low_rank_of(rng, shape, RANK)
        clean = 1.5 * clean / np.std(clean)
        dirty = clean + noise * rng.standard_normal(shape)
        wrong = rng.random(shape) < 0.05
        dirty = np.where(wrong, dirty + 10 * rng.standard_normal(shape), dirty)
        found = fit(dirty.astype(np.float32))
        assert found.rank == RANK
        # That of the best approximation of rank three without errors is σ √(r (m + n − r)).
        error = np.linalg.norm(found.low_rank.materialize() - clean)
        assert error < 2 * noise * (RANK * (M + N - RANK)) ** 0.5
        np.testing.assert_allclose(found.noise, noise, rtol=0.5)
        assert found.trusted


def _rows_that_are_wrong(key):
    first, second = jr.split(key)
    clean = _low_rank(first, (60, 50), 2)
    wrong = jnp.arange(60) < 6
    return clean, wrong, jnp.where(wrong[:, None], 5 * jr.normal(second, (60, 50)), clean)


@pytest.mark.slow
def test_rows_and_columns_may_be_wrong_as_a_whole(getkey):
    clean, wrong, dirty = _rows_that_are_wrong(getkey())
    rows = lrjax.fit_robust_pca(dirty, errors="rows")
    columns = lrjax.fit_robust_pca(dirty.T, errors="columns")
    for found in (rows.low_rank, columns.low_rank.T):
        assert_close(found.materialize()[6:], clean[6:], rtol=1e-4)
    assert rows.rank == columns.rank == 2
    assert jnp.array_equal(jnp.any(rows.sparse != 0, axis=1), wrong)
    assert jnp.array_equal(jnp.any(columns.sparse != 0, axis=0), wrong)


@pytest.mark.slow
def test_so_may_blocks():
    clean = _low_rank(jr.key(0), (96, 80), 2)
    dirty = clean
    for block in range(6):  # one in every second row of blocks
        row, column = 16 * block, 8 * (5 * block % 9)
        dirty = dirty.at[row : row + 8, column : column + 8].set(6.0)
    found = lrjax.fit_robust_pca(dirty, errors=(8, 8), rank=9)
    assert found.rank == 2
    assert found.trusted
    assert_close(found.low_rank.materialize(), clean, rtol=1e-4)
    assert_close(found.sparse, dirty - clean, rtol=1e-4)


@pytest.mark.slow
def test_blocks_may_be_wrong_in_new_rows_too(getkey):
    """Of constant errors in blocks of the same columns it is open whether they are rank."""

    @jax.jit
    @jax.vmap
    def run(key):
        first, second = jr.split(key)
        clean = _low_rank(first, (192, 80), 2)
        dirty = clean
        for half, half_key in enumerate(jr.split(second)):
            for block, column in enumerate(8 * jr.permutation(half_key, 10)[:6]):
                place = 96 * half + 16 * block, column
                dirty = jax.lax.dynamic_update_slice(dirty, jnp.full((8, 8), 6.0), place)
        old = lrjax.fit_robust_pca(dirty[:96], errors=(8, 8), rank=9)
        new = old.update(dirty[96:])
        both = zip((old, new), (clean[:96], clean[96:]), strict=True)
        errors = [jnp.linalg.norm(f.low_rank.materialize() - c) for f, c in both]
        return jnp.stack(errors) / jnp.linalg.norm(clean), old.trusted & new.trusted

    errors, trusted = run(jr.split(getkey(), 10))
    good = jnp.all(errors < 1e-4, axis=1)
    assert good.sum() >= 9
    assert jnp.all(trusted | ~good)


@pytest.mark.slow
def test_a_sample_chooses_for_a_large_matrix(getkey):
    """Noise of .1 in more rows than are asked: as the sample says, all are fitted."""
    shape, noise = (700, 60), 0.1
    clean = _low_rank(getkey(), shape, 3)
    wrong = jr.bernoulli(getkey(), 0.05, shape)
    dirty = clean + noise * jr.normal(getkey(), shape)
    dirty = jnp.where(wrong, dirty + 10 * jr.normal(getkey(), shape), dirty)
    found = jax.jit(lambda x: lrjax.fit_robust_pca(x, rank=12))(dirty)
    assert found.rank == 3
    assert_close(found.noise, noise, rtol=0.2)
    error = jnp.linalg.norm(found.low_rank.materialize() - clean)
    assert error < 1.5 * noise * (3 * (sum(shape) - 3)) ** 0.5
    assert found.trusted
    assert found.predicted
    assert not found.proven


def _low_rank(key, shape, rank):
    left, right = jr.split(key)
    return jr.normal(left, (shape[0], rank)) @ jr.normal(right, (rank, shape[1]))


def _low_rank_of(rng, shape, rank):
    m, n = shape
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
