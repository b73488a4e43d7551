"""How much faster than scikit-learn's Lasso, sample by sample, is sparse self-expression?

1,000 samples of ten subspaces of dimension 8 in 200, with 5 % of noise, in float64, the
lasso and the elastic net. scikit-learn solves every 40th sample and is counted as if it
had solved all, once at its default tolerance and once at one that finds the support.
Seconds are those of processors, one thread for scikit-learn, all for the program. Beside
it, how well real digits are told apart by that, and by what else there is.
"""

import time
import warnings

import _harness
import jax
import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import ElasticNet
from sklearn.metrics import normalized_mutual_info_score

from lrjax import clustering
from lrjax.clustering.sklearn import SubspaceClustering


N, D, DIM, GROUPS, NOISE = 1000, 200, 8, 10, 0.05
EVERY = 40
REPEATS = 5
DIGITS = 1000
KINDS = {"lasso": 1.0, "elastic net, l1 ratio 0.9": 0.9}
TOLERANCES = (1e-4, 1e-8)
SMALL = 1e-6  # what is a zero of the iteration in scikit-learn


def samples(rng: np.random.Generator) -> np.ndarray:
    """Of unit length, of random subspaces."""
    bases = [np.linalg.qr(rng.standard_normal((D, DIM)))[0] for _ in range(GROUPS)]
    x = np.concatenate([rng.standard_normal((N // GROUPS, DIM)) @ b.T for b in bases])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x += NOISE * rng.standard_normal(x.shape) / np.sqrt(D)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def one_by_one(x, gamma, l1_ratio, tol):
    """Seconds for all samples, and the coefficients of some."""
    coefficients = {}
    start = time.process_time()
    for j in range(0, N, EVERY):
        others = np.arange(N) != j
        model = ElasticNet(
            alpha=1 / (gamma[j] * D),
            l1_ratio=l1_ratio,
            fit_intercept=False,
            tol=tol,
            max_iter=100_000,
        )
        model.fit(np.asfortranarray(x[others].T), x[j])
        coefficients[j] = np.insert(model.coef_, j, 0)
    return (time.process_time() - start) * EVERY, coefficients


def speed() -> tuple[list[dict], list[dict]]:
    """Rows and bounds of the lasso and the elastic net."""
    x = samples(np.random.default_rng(0))
    solve = jax.jit(clustering.sparse_self_expression, static_argnames="affine")
    rows, bounds = [], []
    for kind, l1_ratio in KINDS.items():
        run = lambda l1_ratio=l1_ratio: solve(x, l1_ratio=l1_ratio)
        found = jax.block_until_ready(run())
        ours = np.median([_harness.timed(run, time.process_time) for _ in range(REPEATS)])
        ours_wall = np.median([_harness.timed(run) for _ in range(REPEATS)])
        c, gamma = np.asarray(found.coefficients), np.asarray(found.fit_weight)
        row = {
            "kind": kind,
            "seconds": ours,
            "wall seconds": ours_wall,
            "steps": int(found.steps),
            "atoms a sample": float((c != 0).sum(axis=1).mean()),
            "residual": float(np.max(found.residual)),
        }
        for tol in TOLERANCES:
            seconds, peers = one_by_one(x, gamma, l1_ratio, tol)
            alike = [
                bool(((np.abs(p) > SMALL) == (np.abs(c[j]) > SMALL)).all())
                for j, p in peers.items()
            ]
            row[f"scikit-learn, tol {tol:g}"] = seconds
            row[f"supports alike, tol {tol:g}"] = float(np.mean(alike))
        rows.append(row)
        bounds += [
            _harness.bound(
                f"{kind}: time of scikit-learn at its default tolerance over ours",
                row["scikit-learn, tol 0.0001"] / ours,
                at_least=5,
            ),
            _harness.bound(
                f"{kind}: time of scikit-learn at tolerance 1e-8 over ours",
                row["scikit-learn, tol 1e-08"] / ours,
                at_least=5,
            ),
            _harness.bound(
                f"{kind}: share of samples with the support of scikit-learn at 1e-8",
                row["supports alike, tol 1e-08"],
                at_least=0.999,
            ),
            _harness.bound(f"{kind}: optimality conditions", row["residual"], at_most=1e-6),
        ]
    return rows, bounds


def digits() -> tuple[list[dict], list[dict]]:
    """Accuracy on scikit-learn's handwritten digits."""
    x, truth = load_digits(return_X_y=True)
    x, truth = x[:DIGITS] / 16, truth[:DIGITS]
    estimator = lambda **options: SubspaceClustering(10, random_state=0, **options)
    methods = {
        "k-means": KMeans(10, n_init=20, random_state=0).fit_predict,
        "SSC": estimator().fit_predict,
        "SSC, affine": estimator(affine=True).fit_predict,
        "EnSC, 0.9": estimator(l1_ratio=0.9).fit_predict,
        "LRSC": estimator(method="low_rank", keep=50).fit_predict,
        "LSR": estimator(method="ridge", keep=50).fit_predict,
        "10 subspaces of dimension 8": lambda x: (
            clustering.k_subspaces(x, 10, 8, key=jax.random.key(0)).labels
        ),
    }
    rows = []
    for name, predict in methods.items():
        found = np.asarray(predict(x))
        rows.append(
            {
                "digits by": name,
                "error": clustering.clustering_error(found, truth),
                "NMI": float(normalized_mutual_info_score(truth, found)),
            }
        )
    error = {row["digits by"]: row["error"] for row in rows}
    claim = "digits: error of SSC over that of k-means"
    return rows, [_harness.bound(claim, error["SSC"] / error["k-means"], at_most=1.0)]


def main() -> None:
    """Both."""
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")  # scikit-learn does not reach the small tolerance
    rows, bounds = speed()
    more, others = digits()
    _harness.write_results(
        "subspace_clustering", rows + more, bounds + others, "scikit-learn"
    )


if __name__ == "__main__":
    main()
