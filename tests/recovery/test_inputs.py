import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import scipy.sparse

import lrjax
from lrjax import recovery
from lrjax.recovery._inputs import check_width


X = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [3.0, 6.0, 1.0], [4.0, 8.0, 1.0]])
GAP = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]], bool)
HOLED = np.where(GAP, np.nan, X)


def table(x):
    return pandas.DataFrame(x, columns=list("abc"))


FORMS = {
    "masked": np.ma.masked_array(np.where(GAP, 7.0, X), GAP),
    "table": table(HOLED),
    "nullable": table(HOLED).convert_dtypes(),  # integers with pandas.NA
    "list": HOLED.tolist(),
    "objects": np.where(GAP, None, X.astype(object)),
    "jax": jnp.asarray(HOLED),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@forms
def test_every_form_of_a_matrix_has_the_same_entries(form):
    got = recovery.matrix_entries(form)
    want = np.nonzero(~GAP)
    assert got.rows.tolist() == want[0].tolist()
    assert got.cols.tolist() == want[1].tolist()
    assert got.values.tolist() == X[want].tolist()
    assert got.shape == X.shape


@pytest.fixture(scope="module")
def want():
    """One step of the fit, from arrays."""
    return lrjax.fit_robust_pca(jnp.asarray(X), mask=jnp.asarray(~GAP), max_steps=1)


@pytest.mark.slow_but("jax")
@forms
def test_every_form_of_a_matrix_gives_the_same_fit(form, want):
    got = lrjax.fit_robust_pca(form, max_steps=1)
    np.testing.assert_array_equal(got.sparse, want.sparse)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_array"])
def test_of_a_sparse_matrix_what_is_stored_is_observed(kind):
    stored = scipy.sparse.csr_array(np.array([[5.0, 0.0], [0.0, 7.0]]))
    stored.data[1] = 0.0  # a rating of zero, not a missing one
    matrix = getattr(scipy.sparse, kind)(stored.tocoo())
    got = recovery.matrix_entries(matrix)
    assert sorted(got.values.tolist()) == [0.0, 5.0]
    assert got.shape == (2, 2)


@pytest.mark.slow
def test_robust_pca_asks_what_the_gaps_of_a_sparse_matrix_mean(want):
    matrix = scipy.sparse.csr_array(X)
    with pytest.raises(ValueError, match=r"zeros or missing.*toarray\(\).*mask="):
        lrjax.fit_robust_pca(matrix)
    got = lrjax.fit_robust_pca(matrix, mask=scipy.sparse.csr_array(~GAP), max_steps=1)
    np.testing.assert_array_equal(got.sparse, want.sparse)


def test_a_traced_matrix_keeps_its_entries():
    got = jax.jit(lambda x: recovery.matrix_entries(x)[:3])(HOLED)
    assert got[0].shape == (X.size,)
    np.testing.assert_array_equal(got[2], HOLED.ravel().astype(np.float32))


@pytest.mark.slow
def test_a_completion_fit_takes_a_table():
    entries = recovery.matrix_entries(table(HOLED))
    options = {"rank": 1, "max_steps": 1, "effects": None, "pattern": False}
    fit = lrjax.fit_completion(*entries, **options)
    assert fit.low_rank.shape == X.shape
    series = pandas.Series(np.asarray(entries.values))
    same = lrjax.fit_completion(*entries[:2], series, entries.shape, **options)
    np.testing.assert_array_equal(same.low_rank.left, fit.low_rank.left)


DATES = np.array([["2026-01-01"] * 3] * 4, "datetime64[D]")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (X > 1, r"boolean.*astype\(float\)"),
        (jnp.asarray(X > 1), "boolean"),
        (DATES, r"datetime64.*timedelta64\(1, 'D'\)"),
        (DATES - DATES[0], "timedelta64"),
        (X.astype(str), "encode it as numbers"),
        (np.array([["a", 1.0]], object), "objects of type str"),
        (table(X).assign(b="tall"), "column 'b'"),
        (table(X).assign(b=pandas.Timestamp("2026-01-01")), "column 'b' is datetime64"),
        (table(X).assign(b=True), "column 'b' is bool"),
        (table(X).assign(b=pandas.Categorical(["x"] * 4)), "column 'b'"),
    ],
)
def test_refuses_what_is_not_made_of_numbers(matrix, message):
    for method in (lrjax.fit_robust_pca, recovery.matrix_entries):
        with pytest.raises(TypeError, match=message):
            method(matrix)


def test_refuses_complex_numbers():
    with pytest.raises(ValueError, match="real numbers"):
        lrjax.fit_robust_pca(X + 1j)


def test_refuses_numbers_that_no_fit_can_use():
    for rank in (2.5, "2", np.float32(2)):
        with pytest.raises(TypeError, match="fit: rank must be an integer"):
            check_width("fit", rank, 3, (4, 3))
    for options in ({"tol": -1e-3}, {"nuclear_weight": -1.0}, {"tol": float("nan")}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must not be negative"):
            lrjax.fit_robust_pca(X, **options)
    with pytest.raises(ValueError, match="tol must not be negative"):
        lrjax.fit_completion(*recovery.matrix_entries(HOLED), tol=-1.0)
    with pytest.raises(TypeError, match=r"pandas\.factorize"):
        lrjax.fit_completion(["ann", "bob"], [0, 1], [1.0, 2.0], (2, 2))


@pytest.mark.slow
def test_a_share_of_outliers_may_be_an_integer():
    problem = lrjax.robust_pca(jax.random.key(0), (6, 5), 1, outlier_fraction=0)
    assert float(problem.relative_error(problem.truth)) == 0
    np.testing.assert_allclose(problem.targets, problem.truth.materialize(), rtol=1e-5)
