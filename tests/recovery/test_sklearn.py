import importlib
import pickle
import sys

import numpy as np
import pandas
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

import lrjax
from lrjax.recovery.sklearn import MatrixCompletion, RobustPCA


M, N, RANK = 80, 30, 2
RNG = np.random.default_rng(0)  # one draw: the programs and the fits below are shared
CLEAN = RNG.normal(size=(M, RANK)) @ RNG.normal(size=(RANK, N)) + RNG.normal(size=N)
GROSS = RNG.random((M, N)) < 0.05
GAPS = RNG.random((M, N)) < 0.1
DIRTY = np.where(GROSS, CLEAN + 20, CLEAN)
DIRTY[GAPS] = np.nan
HOLED = np.where(GAPS, np.nan, CLEAN)
SINGLE = 1e-3  # separation and regression end at 1e-6 and lose some digits in float32


@pytest.fixture(scope="module")
def pca():
    return RobustPCA().fit(DIRTY)


@pytest.fixture(scope="module")
def imputer():
    return MatrixCompletion().fit(HOLED)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [RobustPCA(), MatrixCompletion()], ids=repr)
def test_passes_the_checks_of_scikit_learn(estimator):
    """All of them; the one on array API input skips itself unless that is switched on."""
    results = check_estimator(estimator, on_skip=None)
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert len(results) > 40
    assert skipped <= {"check_array_api_input"}


@pytest.mark.slow
def test_components_are_those_of_pca_on_the_clean_table(pca):
    want = PCA(RANK).fit(CLEAN)
    assert pca.n_components_ == RANK
    cosines = np.abs(np.sum(pca.components_ * want.components_, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=SINGLE)
    np.testing.assert_allclose(pca.mean_, want.mean_, atol=SINGLE)
    for name in (
        "singular_values_",
        "explained_variance_",
        "explained_variance_ratio_",
    ):
        np.testing.assert_allclose(getattr(pca, name), getattr(want, name), rtol=SINGLE)


def test_coordinates_give_the_clean_table_back(pca):
    back = pca.inverse_transform(pca.transform(DIRTY))
    np.testing.assert_allclose(back, CLEAN, atol=SINGLE * np.abs(CLEAN).max())
    assert back.dtype == np.float64
    assert pca.transform(DIRTY.astype(np.float32)).dtype == np.float32


def test_a_row_does_not_depend_on_the_others(pca):
    alone = pca.transform(DIRTY[:1])
    np.testing.assert_allclose(pca.transform(DIRTY[:5])[:1], alone, rtol=1e-6)


def test_fewer_components_are_the_first_ones(pca):
    one = RobustPCA(n_components=1).fit(DIRTY)
    cosine = np.abs(one.components_[0] @ pca.components_[0])
    np.testing.assert_allclose(cosine, 1, atol=SINGLE)
    with pytest.raises(ValueError, match=r"between 1 and .* = 30, got 2\.5"):
        RobustPCA(n_components=2.5).fit(DIRTY)


@pytest.mark.slow
def test_an_imputer_fills_gaps_and_nothing_else(imputer):
    filled = imputer.transform(HOLED)
    np.testing.assert_array_equal(filled[~GAPS], HOLED[~GAPS])
    error = np.sqrt(np.mean((filled[GAPS] - CLEAN[GAPS]) ** 2))
    assert error < 0.05 * CLEAN.std()
    assert imputer.rank_ == RANK
    nothing = imputer.transform(np.full((1, N), np.nan))
    assert np.isfinite(nothing).all()


@pytest.mark.slow
def test_an_imputer_leaves_out_columns_without_entries():
    table = np.column_stack([np.full(M, np.nan), HOLED, np.full(M, 5.0)])
    left_out = MatrixCompletion().fit(table)
    assert left_out.transform(table).shape == (M, N + 1)
    assert left_out.get_feature_names_out()[0] == "x1"
    kept = clone(left_out).set_params(keep_empty_features=True).fit(table)
    filled = kept.transform(table)
    assert len(kept.get_feature_names_out()) == N + 2
    np.testing.assert_array_equal(filled[:, 0], 0)
    np.testing.assert_array_equal(filled[:, -1], 5)


@pytest.mark.slow
def test_gross_errors_among_the_entries():
    rough = np.where(GROSS & ~GAPS, HOLED + 1e3, HOLED)
    filled = MatrixCompletion(robust=True).fit_transform(rough)
    error = np.sqrt(np.mean((filled[GAPS] - CLEAN[GAPS]) ** 2))
    assert error < 0.2 * CLEAN.std()


@pytest.mark.slow
def test_tables_in_and_out_of_a_pipeline():
    table = pandas.DataFrame(HOLED, columns=[f"c{k}" for k in range(N)])
    steps = make_pipeline(MatrixCompletion(), RobustPCA(RANK))
    out = steps.set_output(transform="pandas").fit_transform(table)
    assert list(out.columns) == ["robustpca0", "robustpca1"]
    assert list(out.index) == list(table.index)
    names = steps[:1].get_feature_names_out()
    assert list(names) == list(table.columns)
    y = CLEAN @ np.arange(N)
    model = make_pipeline(RobustPCA(), LinearRegression()).fit(DIRTY, y)
    assert model.score(DIRTY, y) > 0.999


@pytest.mark.slow
def test_pickles(pca, imputer):
    for estimator, X in ((pca, DIRTY), (imputer, HOLED)):
        again = pickle.loads(pickle.dumps(estimator))
        np.testing.assert_array_equal(again.transform(X), estimator.transform(X))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "lrjax.recovery.sklearn")
    with pytest.raises(ImportError, match=r"lrjax\[sklearn\]"):
        importlib.import_module("lrjax.recovery.sklearn")
    assert lrjax.fit_completion  # all else is there without it
