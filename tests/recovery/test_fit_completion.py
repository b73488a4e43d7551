import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lrjax
from lrjax.recovery.completion.grouped import back_project, group_by_row, scan_rows

from ..helpers import all_finite, assert_close


M, N, RANK, WIDTH = 64, 64, 3, 6
STATIC = ("shape", "rank", "robust", "effects", "units", "pattern", "max_steps", "reduce")
jitted = jax.jit(lrjax.fit_completion, static_argnames=STATIC)
transform = jax.jit(lrjax.recovery.CompletionFit.transform, static_argnums=4)


def fit(*entries, limits=(-np.inf, np.inf), **options):
    """One program, with limits or without."""
    return jitted(*entries, limits=limits, **options)


@jax.jit
def problem(seed=0, noise=0.0, outliers=0.0):
    return lrjax.matrix_completion(
        jr.key(seed),
        (M, N),
        RANK,
        observed=0.5,
        condition=5.0,
        noise=noise,
        outlier_fraction=outliers,
    )


def complete(p, **options):
    at = p.operator
    return fit(at.rows, at.cols, p.targets, (M, N), rank=WIDTH, **options)


@pytest.mark.parametrize("seed", range(5))
def test_clean_data_give_matrix_and_rank(seed):
    p = problem(seed)
    result = complete(p)
    assert float(p.relative_error(result.low_rank)) < 3e-5
    assert int(result.rank) == RANK
    right = result.low_rank.right[:, :RANK]
    assert_close(right.T @ right, jnp.eye(RANK), rtol=1e-5)
    sizes = jnp.linalg.norm(result.low_rank.left, axis=0)
    assert bool(jnp.all(sizes[:-1] >= sizes[1:]))
    # Row and column effects that there are not leave their rounding errors.
    assert float(sizes[RANK:].max()) < 1e-4 * float(sizes[0])
    assert float(sizes[RANK + 2 :].max()) == 0
    assert bool(result.converged)
    assert bool(result.trusted)
    at = p.operator
    assert_close(result.predict(at.rows, at.cols), p.targets, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_estimated_and_not_fitted(seed):
    p = problem(seed, 0.1)
    result = complete(p)
    size = jnp.sqrt(jnp.mean(p.operator(p.truth) ** 2))
    np.testing.assert_allclose(result.noise, 0.1 * size, rtol=0.15)
    # The error of the best rank-3 fit that knows the singular vectors' dimension.
    free = RANK * (M + N - RANK) / len(p.targets)
    assert float(p.relative_error(result.low_rank)) < 1.3 * 0.1 * free**0.5
    assert int(result.rank) == RANK


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_gross_errors(seed):
    p = problem(seed, 0.0, 0.1)
    robust = p.relative_error(complete(p, robust=True).low_rank)
    plain = p.relative_error(complete(p).low_rank)
    assert float(robust) < 1e-4 < 0.1 < float(plain)


@pytest.mark.slow
def test_the_scale_of_the_data_and_their_order_do_not_matter():
    p = problem()
    want = complete(p)
    at = p.operator
    shuffled = jr.permutation(jr.key(1), len(p.targets))
    for scale in (1e-6, 1e6):
        rows, cols, values = (x[shuffled] for x in (at.rows, at.cols, scale * p.targets))
        got = fit(rows, cols, values, (M, N), rank=WIDTH)
        image = got.low_rank.materialize() / scale
        assert_close(image, want.low_rank.materialize(), rtol=1e-4)


def test_the_transpose_gives_the_transpose():
    p = problem(0, 0.1)
    at = p.operator
    got = fit(at.cols, at.rows, p.targets, (N, M), rank=WIDTH)
    want = complete(p).low_rank.materialize()
    # But for the noise, 0.1 of the entries, which is estimated for each column.
    assert_close(got.low_rank.materialize().T, want, rtol=2e-2)


@pytest.mark.slow
def test_several_matrices_with_different_numbers_of_entries():
    problems = [problem(seed, 0.1) for seed in range(3)]
    padded = [p.targets.at[: 40 * k].set(jnp.nan) for k, p in enumerate(problems)]
    stack = lambda xs: jnp.stack(list(xs))
    rows, cols = (stack(getattr(p.operator, s) for p in problems) for s in ("rows", "cols"))
    run = lambda i, j, y: lrjax.fit_completion(i, j, y, (M, N), rank=WIDTH)
    batch = jax.jit(jax.vmap(run))(rows, cols, stack(padded))
    for k in range(3):
        one = fit(rows[k], cols[k], padded[k], (M, N), rank=WIDTH)
        got = lrjax.LowRank(batch.low_rank.left[k], batch.low_rank.right[k])
        assert_close(got.materialize(), one.low_rank.materialize(), rtol=1e-4)
        assert int(batch.steps[k]) == int(one.steps)


@pytest.mark.slow
def test_new_rows():
    p = problem(0, 0.01)
    result = complete(p)
    at = p.operator
    values = jnp.where(at.rows == 5, jnp.nan, p.targets)
    again = transform(result, at.rows, at.cols, values, M)
    others = jnp.delete(again, 5, axis=0)
    assert_close(others, jnp.delete(result.low_rank.left, 5, axis=0), rtol=1e-2)
    mean = jnp.mean(result.low_rank.left, axis=0)
    assert_close(again[5], mean, rtol=0.2)  # without any entry: the mean row
    with pytest.raises(ValueError, match=r"\[0, 21\)"):
        result.transform(at.rows, at.cols, values, 21)


@pytest.mark.slow
def test_new_rows_with_gross_errors():
    result = complete(problem(0, 0.01), robust=True)
    rows = jr.normal(jr.key(1), (M, RANK)) @ problem().truth.right.T
    at = problem().operator
    values = rows[at.rows, at.cols]
    wrong = jr.bernoulli(jr.key(3), 0.1, values.shape)
    values = jnp.where(wrong, 20 * rows.max(), values)
    scores = transform(result, at.rows, at.cols, values, M)
    assert_close(scores @ result.low_rank.right.T, rows, rtol=0.1)


@pytest.mark.slow
def test_a_repeated_entry_is_a_repeated_observation():
    p = problem(0, 0.3)
    i, j, y = p.operator.rows, p.operator.cols, p.targets
    half = len(y) // 2
    missing = jnp.full(half, jnp.nan)
    once = fit(i, j, jnp.concatenate([y[:half], missing]), (M, N), rank=WIDTH)
    doubled = (jnp.concatenate([x[:half], x[:half]]) for x in (i, j, y))
    twice = fit(*doubled, (M, N), rank=WIDTH)
    # Twice the evidence: less is taken for noise.
    left = lambda f: float(jnp.linalg.norm((f.predict(i, j) - y)[:half]))
    assert left(twice) < left(once)
    # Two values of one entry count as their mean.
    clean = problem()
    values = clean.targets
    values = values.at[-1].set(values[0] - 1e-3).at[0].add(1e-3)
    i, j = i.at[-1].set(i[0]), j.at[-1].set(j[0])
    both = fit(i, j, values, (M, N), rank=WIDTH)
    assert float(clean.relative_error(both.low_rank)) < 1e-3


def rows_on_devices(p, devices=8):
    """Entries by the device that holds their row, as many for each, and local rows."""
    local = M // devices
    at = p.operator
    owner = np.asarray(at.rows) // local
    most = np.bincount(owner, minlength=devices).max()
    parts = np.zeros((3, devices, most))
    parts[2] = np.nan
    for device in range(devices):
        mine = owner == device
        entries = (np.asarray(at.rows)[mine] % local, at.cols[mine], p.targets[mine])
        for part, values in zip(parts, entries, strict=True):
            part[device, : mine.sum()] = values
    rows, cols, values = (jnp.asarray(part.reshape(-1)) for part in parts)
    return rows.astype(jnp.int32), cols.astype(jnp.int32), values.astype(jnp.float32)


@pytest.mark.slow
def test_rows_on_eight_devices_give_the_same():
    p = problem(0, 0.1, 0.05)
    want = complete(p, robust=True)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(rows, cols, values):
        result = lrjax.fit_completion(
            rows,
            cols,
            values,
            (M // 8, N),
            rank=WIDTH,
            robust=True,
            reduce=lambda x: jax.lax.psum(x, "rows"),
        )
        return result.low_rank.left, result.low_rank.right, result.rank, result.noise

    spread = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("rows"),) * 3,
        out_specs=(P("rows"), P(), P(), P()),
        check_vma=False,
    )
    left, right, rank, noise = jax.jit(spread)(*rows_on_devices(p))
    # They hold out other entries, and end where a step is small next to the noise.
    assert_close(left @ right.T, want.low_rank.materialize(), rtol=1e-2)
    assert int(rank) == int(want.rank)
    np.testing.assert_allclose(noise, want.noise, rtol=1e-2)


BAD = {
    "a row of NaN": lambda i, j, y: jnp.where(i == 3, jnp.nan, y),
    "a column of NaN": lambda i, j, y: jnp.where(j == 3, jnp.nan, y),
    "an infinite entry": lambda i, j, y: y.at[7].set(jnp.inf),
    "a zero matrix": lambda i, j, y: 0 * y,
    "nothing observed": lambda i, j, y: jnp.full_like(y, jnp.nan),
    "one entry observed": lambda i, j, y: y.at[1:].set(jnp.nan),
}


@pytest.mark.slow
@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_degenerate_data_give_finite_numbers(name, robust):
    p = problem()
    at = p.operator
    values = BAD[name](at.rows, at.cols, p.targets)
    result = fit(at.rows, at.cols, values, (M, N), rank=WIDTH, robust=robust)
    assert all_finite((result.low_rank, result.noise, result.prior))
    image = result.low_rank.materialize()
    if name in ("a zero matrix", "nothing observed"):
        assert float(jnp.abs(image).max()) == 0
        assert int(result.rank) == 0
    if name == "an infinite entry":
        assert float(p.relative_error(result.low_rank)) < 1e-4
    if name == "a row of NaN":
        others = jnp.delete(image, 3, axis=0)
        assert_close(others, jnp.delete(p.truth.materialize(), 3, axis=0), rtol=1e-4)
        assert_close(image[3], others.mean(axis=0), rtol=0.3)


@pytest.mark.slow
def test_integers_and_the_rank_of_the_short_side():
    matrix = jnp.outer(jnp.arange(1, 10), jnp.arange(1, 7))
    i, j = jnp.nonzero(matrix != 24)
    result = fit(i, j, matrix[i, j], matrix.shape)
    assert result.low_rank.rank == 6
    assert int(result.rank) == 1
    assert_close(result.low_rank.materialize(), matrix.astype(jnp.float32), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_quarter_of_gross_errors(seed):
    keys = jr.split(jr.key(seed), 3)
    p = lrjax.matrix_completion(keys[0], (M, N), RANK, observed=0.8)
    at, size = p.operator, jnp.std(p.targets)
    wrong = jr.bernoulli(keys[1], 0.25, p.targets.shape)
    errors = 10 * size * jr.normal(keys[2], wrong.shape)
    values = jnp.where(wrong, p.targets + errors, p.targets)
    result = fit(at.rows, at.cols, values, (M, N), rank=WIDTH, robust=True)
    assert float(p.relative_error(result.low_rank)) < 1e-3
    assert int(result.rank) == RANK


@pytest.mark.slow
def test_effects_of_rows_and_columns_alone(getkey):
    at = problem().operator
    b, c = jr.normal(getkey(), (M, 1)), 3 * jr.normal(getkey(), (1, N)) + 7
    result = fit(at.rows, at.cols, (b + c)[at.rows, at.cols], (M, N), rank=WIDTH)
    assert_close(result.low_rank.materialize(), b + c, rtol=1e-4)
    assert int(result.rank) == 0


@pytest.mark.slow
@pytest.mark.parametrize("effects", ["rows", "cols"])
@pytest.mark.parametrize("units", ["shared", "columns"])
def test_effects_of_one_side_keep_the_center(effects, units, getkey):
    """The center is part of the matrix and of new rows, whichever side has effects."""
    p, at = problem(0), problem(0).operator
    image = p.truth.materialize()
    image = 30.0 + image / jnp.std(image)
    values = image[at.rows, at.cols]
    result = fit(at.rows, at.cols, values, (M, N), rank=WIDTH, effects=effects, units=units)
    np.testing.assert_allclose(result.low_rank.materialize(), image, atol=1e-2)
    again = transform(result, at.rows, at.cols, values, M)
    np.testing.assert_allclose(again @ result.low_rank.right.T, image, atol=3e-2)
    empty = transform(result, at.rows, at.cols, jnp.full_like(values, jnp.nan), M)
    np.testing.assert_allclose(
        empty @ result.low_rank.right.T, jnp.full((M, N), 30.0), atol=3.0
    )


@pytest.mark.slow
def test_without_effects_a_direction_that_the_means_carry_is_counted():
    at = problem().operator
    row = 2 + jnp.linspace(0, 1, N)
    image = jnp.ones((M, 1)) * row[None, :]
    result = fit(
        at.rows, at.cols, image[at.rows, at.cols], (M, N), rank=WIDTH, effects=None
    )
    assert int(result.rank) == 1
    assert_close(result.low_rank.materialize(), image, rtol=1e-3)
    assert result.low_rank.rank == WIDTH


def test_too_few_entries_are_told_from_enough():
    p = problem(0, 0.1)
    at = p.operator
    assert bool(complete(p).trusted)
    clean = problem()
    # Fewer numbers than the matrix has degrees of freedom, 3 (64 + 64 - 3).
    few = jnp.where(jnp.arange(len(p.targets)) < 300, clean.targets, jnp.nan)
    result = fit(at.rows, at.cols, few, (M, N), rank=WIDTH)
    error = float(clean.relative_error(result.low_rank))
    size = float(jnp.sqrt(jnp.mean(clean.truth.materialize() ** 2)))
    assert error > 0.5
    assert float(result.held_out_error) > 0.3 * size


@pytest.mark.slow
def test_values_that_are_missing_because_they_are_large():
    p = problem(0, 0.05)
    at, y = p.operator, p.targets
    kept = jnp.where(y > jnp.quantile(y, 0.8), jnp.nan, y)
    result = fit(at.rows, at.cols, kept, (M, N), rank=WIDTH)
    hidden = jnp.isnan(kept)
    error = jnp.where(hidden, result.predict(at.rows, at.cols) - y, 0)
    plain = jnp.where(hidden, jnp.nanmean(kept) - y, 0)
    assert float(jnp.linalg.norm(error)) < 0.3 * float(jnp.linalg.norm(plain))


@pytest.mark.slow
def test_one_entry_in_a_row_and_constant_columns():
    p = problem(0, 0.01)
    at, y = p.operator, p.targets
    first = jnp.argmax(at.rows == 5)
    lonely = (at.rows != 5) | (jnp.arange(len(y)) == first)
    y = jnp.where(at.cols == 3, 2.0, jnp.where(lonely, y, jnp.nan))
    result = fit(at.rows, at.cols, y, (M, N), rank=WIDTH)
    image = result.low_rank.materialize()
    assert all_finite(image)
    rows = jnp.arange(M) != 5
    assert_close(image[rows, 3], jnp.full(M - 1, 2.0), rtol=0.05)
    # A row of one entry is not sent far beyond the others.
    assert float(jnp.abs(image[5]).max()) < float(jnp.abs(image[rows]).max())


@pytest.mark.slow
def test_rows_that_are_wrong_as_a_whole():
    p = problem(0)
    at = p.operator
    wrong = at.rows < 4
    values = jnp.where(wrong, 30 * jnp.sin(7.0 * at.cols), p.targets)
    result = fit(at.rows, at.cols, values, (M, N), rank=WIDTH, robust=True)
    image, want = result.low_rank.materialize()[4:], p.truth.materialize()[4:]
    assert_close(image, want, rtol=1e-2)


@pytest.mark.slow
def test_columns_with_units_of_their_own():
    p = problem(0, 0.1)
    at, y = p.operator, p.targets
    scale = jnp.logspace(-3, 3, N)
    shift = 5 * scale * jnp.cos(jnp.arange(N))
    y = y.at[at.cols == 3].set(2.0)
    run = lambda y: fit(at.rows, at.cols, y, (M, N), rank=WIDTH, units="columns")
    one, other = run(y), run(scale[at.cols] * y + shift[at.cols])
    want = scale[None, :] * one.low_rank.materialize() + shift[None, :]
    found = other.low_rank.materialize()
    others = jnp.arange(N) != 3
    error = jnp.abs(found - want) / scale[None, :]
    assert float(error[:, others].max()) < 1e-2
    assert_close(one.low_rank.materialize()[:, 3], jnp.full(M, 2.0), rtol=1e-2)
    assert_close(other.noise[others], (scale * one.noise)[others], rtol=1e-2)
    assert_close(
        transform(other, at.rows, at.cols, scale[at.cols] * y + shift[at.cols], M),
        other.low_rank.left,
        rtol=1e-2,
    )


@pytest.mark.slow
def test_columns_with_noise_of_their_own(getkey):
    p = problem(0)
    at, size = p.operator, jnp.std(p.targets)
    deviation = size * jnp.logspace(-0.5, 0, N)
    values = p.targets + deviation[at.cols] * jr.normal(getkey(), p.targets.shape)
    result = fit(at.rows, at.cols, values, (M, N), rank=WIDTH, units="columns")
    quarter = N // 4
    found = jnp.mean(result.noise[-quarter:]) / jnp.mean(result.noise[:quarter])
    want = jnp.mean(deviation[-quarter:]) / jnp.mean(deviation[:quarter])
    # Drawn together by what each column shares with the others.
    assert 0.6 * float(want) < float(found) < 1.3 * float(want)


@pytest.mark.slow
def test_features_tell_of_rows_and_columns_without_entries(getkey):
    at = problem().operator
    told, weights = jr.normal(getkey(), (M, 2)), jr.normal(getkey(), (2, N))
    image = told @ weights + 4.0
    noise = 0.1 * jr.normal(getkey(), at.rows.shape)
    values = image[at.rows, at.cols] + noise
    cold = at.rows < 5
    values = jnp.where(cold, jnp.nan, values)
    result = fit(at.rows, at.cols, values, (M, N), rank=WIDTH, row_features=told)
    assert_close(result.low_rank.materialize()[:5], image[:5], rtol=0.1)
    new = result.transform([0], [0], [jnp.nan], 5, features=told[:5])
    assert_close(new @ result.low_rank.right.T, image[:5], rtol=0.1)
    with pytest.raises(ValueError, match="2 features of each row, got 0"):
        result.transform([0], [0], [1.0], 1)
    with pytest.raises(ValueError, match="as many rows"):
        fit(at.rows, at.cols, values, (M, N), rank=WIDTH, col_features=told[:9])
    with pytest.raises(ValueError, match="have to be finite"):
        lrjax.fit_completion(
            at.rows, at.cols, values, (M, N), row_features=told.at[0, 0].set(jnp.nan)
        )


@pytest.mark.slow
def test_the_pattern_of_the_entries_tells_of_the_values():
    """Columns that are seldom seen are low: what is seen once is guessed from that."""
    m, n = 200, 60
    keys = jr.split(jr.key(0), 3)
    seen_by = jr.uniform(keys[0], (n,)) ** 2
    mask = jr.uniform(keys[1], (m, n)) < 0.02 + 0.3 * seen_by[None, :]
    truth = jnp.broadcast_to(3 * jnp.log(0.1 + seen_by)[None, :], (m, n))
    y = truth + 2 * jr.normal(keys[2], (m, n))
    i, j = (x.ravel() for x in jnp.indices((m, n)))
    values = jnp.where(mask, y, jnp.nan).ravel()
    errors = []
    for pattern in (True, False):
        result = fit(i, j, values, (m, n), rank=2, pattern=pattern)
        errors.append(jnp.linalg.norm(result.low_rank.materialize() - truth))
    assert float(errors[0]) < 0.98 * float(errors[1])


def test_predictions_are_clipped_to_their_limits():
    p = problem()
    at = p.operator
    result = fit(at.rows, at.cols, p.targets, (M, N), rank=WIDTH, limits=(-0.5, 0.5))
    found = result.predict(at.rows, at.cols)
    assert_close(found, jnp.clip(p.targets, -0.5, 0.5), rtol=1e-4)
    with pytest.raises(ValueError, match="least first"):
        lrjax.fit_completion(at.rows, at.cols, p.targets, (M, N), limits=(5, 0))


def test_bad_arguments_are_refused():
    i, y = jnp.array([0, 1]), jnp.ones(2)
    run = lrjax.fit_completion
    with pytest.raises(ValueError, match="one length"):
        run(i, i, jnp.ones(3), (4, 3))
    with pytest.raises(ValueError, match="one length"):
        run(i[None], i[None], y[None], (4, 3))
    with pytest.raises(ValueError, match=r"rows in \[0, 4\).*-1 to 4"):
        run(jnp.array([-1, 4]), i, y, (4, 3))
    with pytest.raises(ValueError, match=r"cols in \[0, 3\)"):
        run(i, i + 2, y, (4, 3))
    with pytest.raises(ValueError, match="at least one"):
        run(i[:0], i[:0], y[:0], (4, 3))
    with pytest.raises(ValueError, match="one length"):  # lists are taken, too
        run([0, 1], [0, 1], [1.0], (4, 3))
    with pytest.raises(TypeError, match=r"integers as rows, got float"):
        run(y, i, y, (4, 3))
    with pytest.raises(ValueError, match="rank must be between 1 and 3"):
        run(i, i, y, (4, 3), rank=4)
    with pytest.raises(ValueError, match=r"shape \(m, n\)"):
        run(i, i, y, (4, 0))
    with pytest.raises(TypeError, match="boolean"):
        run(i, i, np.array([True, False]), (4, 3))
    with pytest.raises(TypeError, match="datetime64"):
        run(i, i, np.array(["2026-01-01", "2026-01-02"], "datetime64[D]"), (4, 3))


@pytest.mark.slow
def test_indices_may_be_constants_of_a_jitted_function():
    at, p = problem().operator, problem()
    run = lambda y, **shape: lrjax.fit_completion(
        at.rows, at.cols, y, (M, shape.get("n", N)), rank=WIDTH
    )
    got = jax.jit(run)(p.targets).low_rank.materialize()
    want = complete(p).low_rank.materialize()
    assert_close(got, want, rtol=1e-4)
    with pytest.raises(ValueError, match=r"cols in \[0, 5\)"):
        jax.jit(lambda y: run(y, n=5))(p.targets)


@pytest.mark.slow
def test_rows_are_visited_in_blocks_of_slabs(monkeypatch):
    monkeypatch.setattr(lrjax.recovery.completion.grouped, "ROWS", 5)
    key_place, key_value, key_vector = jr.split(jr.key(0), 3)
    places = jr.randint(key_place, (60,), 0, 13 * 7)  # with repetitions
    rows, cols, values = places // 7, places % 7, jr.normal(key_value, (60,))
    vectors = jr.normal(key_vector, (7, 2))
    dense = jnp.zeros((13, 7)).at[rows, cols].add(values)
    entries = group_by_row(rows, cols, values, 13)
    assert_close(back_project(entries, vectors), dense @ vectors)
    count = lambda carry, block: (carry + 1, block.counts[:, None])
    blocks, counts = scan_rows(count, 0, entries, vectors)
    assert int(blocks) == 3
    assert_close(counts[:, 0], jnp.bincount(rows, length=13))


@pytest.mark.slow
def test_a_matrix_alone_is_its_entries():
    matrix = np.outer(np.arange(1.0, 13), np.arange(1.0, 9)).astype(np.float32)
    matrix[np.arange(8), np.arange(8)] = np.nan
    options = {"rank": 2, "max_steps": 4, "pattern": False, "effects": None}
    alone = lrjax.fit_completion(matrix, **options)
    entries = lrjax.recovery.matrix_entries(matrix)
    want = lrjax.fit_completion(*entries, **options)
    np.testing.assert_array_equal(alone.low_rank.left, want.low_rank.left)
    with pytest.raises(TypeError, match=r"a matrix alone.*matrix_entries\(matrix, mask\)"):
        lrjax.fit_completion(matrix, np.isfinite(matrix))
