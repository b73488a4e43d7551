"""How often does robust PCA succeed that is told neither the rank nor the errors?"""

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lrjax


SIZE, RANK, SEEDS = 500, 5, 50
OUTLIERS, OBSERVED, CONDITION = 0.1, 0.9, 10.0
SUCCESS = 1e-4  # relative error of the low-rank part


@jax.jit
def run(seed):
    problem = lrjax.robust_pca(
        jr.key(seed),
        (SIZE, SIZE),
        RANK,
        OUTLIERS,
        observed=OBSERVED,
        condition=CONDITION,
    )
    fit = lrjax.fit_robust_pca(problem.targets, mask=problem.operator.mask)
    error = problem.relative_error(fit.low_rank)
    return error, fit.rank, fit.steps, fit.residual


def main():
    results = [run(jnp.asarray(seed)) for seed in range(SEEDS)]
    errors, ranks, steps, residuals = (np.asarray(x) for x in zip(*results, strict=True))
    row = {
        "size": SIZE,
        "rank": RANK,
        "outliers": OUTLIERS,
        "observed": OBSERVED,
        "condition": CONDITION,
        "seeds": SEEDS,
        "told": "nothing",
        "success rate": float(np.mean(errors <= SUCCESS)),
        "rank found": float(np.mean(ranks == RANK)),
        "worst error": float(errors.max()),
        "median error": float(np.median(errors)),
        "median steps": float(np.median(steps)),
        "worst residual": float(residuals.max()),
    }
    bounds = [_harness.bound("success rate", row["success rate"], at_least=0.95)]
    _harness.write_results("recovery_fit_robustness", [row], bounds)


if __name__ == "__main__":
    main()
