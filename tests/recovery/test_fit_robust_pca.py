import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lrjax

from ..helpers import all_finite, assert_close


fit = jax.jit(lrjax.fit_robust_pca, static_argnames=("rank", "max_rank", "max_steps"))
M, N, RANK = 120, 100, 3


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


def test_a_known_rank_gives_the_same_matrix():
    p = problem()
    result = fit(p.targets, mask=p.operator.mask, rank=RANK)
    assert result.low_rank.rank == RANK
    assert float(p.relative_error(result.low_rank)) < 1e-4


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


def test_several_matrices_at_once():
    problems = [problem(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    run = jax.vmap(lambda y, mask: lrjax.fit_robust_pca(y, mask=mask))
    batch = jax.jit(run)(stacked.targets, stacked.operator.mask)
    for k, p in enumerate(problems):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], batch)
        assert float(p.relative_error(one.low_rank)) < 1e-4
        assert int(one.rank) == RANK


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


def test_row_blocks_on_a_mesh_give_the_same():
    p = problem()
    want = fit(p.targets, mask=p.operator.mask)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    blocks = NamedSharding(mesh, PartitionSpec("rows", None))
    args = jax.device_put((p.targets, p.operator.mask), blocks)
    got = fit(args[0], mask=args[1])
    assert_close(got.low_rank.materialize(), want.low_rank.materialize(), rtol=1e-5)


BAD_ROWS = {
    "a row of NaN": lambda y: y.at[3].set(jnp.nan),
    "a column of NaN": lambda y: y.at[:, 3].set(jnp.nan),
    "an infinite entry": lambda y: y.at[2, 5].set(jnp.inf),
    "a zero matrix": lambda y: 0 * y,
    "nothing observed": lambda y: jnp.full_like(y, jnp.nan),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_degenerate_data_give_finite_numbers(name):
    p = problem(observed=0.999)
    result = fit(BAD_ROWS[name](p.targets), mask=p.operator.mask)
    assert all_finite((result.low_rank, result.sparse))
    if name in ("a zero matrix", "nothing observed"):
        assert float(jnp.abs(result.low_rank.materialize()).max()) == 0
        assert int(result.rank) == 0
    if name == "an infinite entry":
        assert float(p.relative_error(result.low_rank)) < 1e-4


def test_integer_data_and_rank_of_the_short_side():
    matrix = jnp.outer(jnp.arange(1, 31), jnp.arange(1, 21)).at[3, 4].set(5000)
    result = lrjax.fit_robust_pca(matrix)
    want = jnp.outer(jnp.arange(1.0, 31.0), jnp.arange(1.0, 21.0))
    assert int(result.rank) == 1
    assert_close(result.low_rank.materialize(), want, rtol=1e-4)
    assert_close(result.sparse[3, 4], 5000 - want[3, 4], rtol=1e-3)
    everything = lrjax.fit_robust_pca(matrix, rank=20)
    assert all_finite(everything.low_rank)


def test_bad_arguments_are_refused():
    matrix = jnp.ones((6, 5))
    with pytest.raises(ValueError, match="mask"):
        lrjax.fit_robust_pca(matrix, mask=jnp.ones((5, 6), bool))
    with pytest.raises(ValueError, match="rank must be between 1 and 5"):
        lrjax.fit_robust_pca(matrix, rank=6)
    with pytest.raises(ValueError, match="max_rank must be between 1 and 5"):
        lrjax.fit_robust_pca(matrix, max_rank=0)
    with pytest.raises(ValueError, match="not both"):
        lrjax.fit_robust_pca(matrix, rank=2, max_rank=3)
    with pytest.raises(ValueError, match="entries"):
        lrjax.fit_robust_pca(jnp.ones((0, 5)))
