"""How often does a method that is told nothing recover a matrix from corrupted sensing?

n = 80, r = 4, condition 20, m = 24 n r = 7680 measurements of which 20 % are grossly wrong,
factors of width 8. The method knows the measurements and the width: neither the smallest
loss nor the share of outliers nor the rank. Ten draws of truth and outliers share one
operator (of 196 MB) and run in one vmap; there are five operators.
"""

import functools

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lrjax
from lrjax import recovery


SIZE, RANK, WIDTH, MEASUREMENTS = 80, 4, 8, 24 * 80 * 4
OPERATORS, DRAWS, STEPS, LEVEL = 5, 10, 100, 1e-4


METHODS = {
    # Polyak's steps with a level that is searched on the way.
    "searched level": lambda size: lrjax.scaled_subgradient(f_min="search"),
    # Steps and damping that fall by 7 % each, from a tenth of the size of the start.
    "geometric": lambda size: lrjax.opsa(
        lambda count: 0.1 * size * 0.93**count,
        f_min=None,
        damping=lambda count: 0.1 * 0.93**count,
    ),
}


@functools.partial(jax.jit, static_argnames="method")
def errors(operator, key, method):
    """The relative errors of all draws at every step."""

    def one(key):
        k_truth, k_start = jr.split(key)
        problem = draw(operator, k_truth)
        start = lrjax.spectral_init(problem, WIDTH, key=k_start)
        tx = METHODS[method](lrjax.norm(start))
        return lrjax.solve(problem, tx, start, steps=STEPS).history.relative_error

    return jax.vmap(one)(jr.split(key, DRAWS))


def draw(operator, key):
    """A truth and its corrupted measurements by a given operator."""
    k_left, k_right, k_where, k_size = jr.split(key, 4)
    values = jnp.linspace(1.0, 1 / 20, RANK)[None, :]
    orthonormal = lambda k: lrjax.linalg.orthonormalize(jr.normal(k, (SIZE, RANK)))
    truth = lrjax.balance(lrjax.LowRank(orthonormal(k_left) * values, orthonormal(k_right)))
    y = operator(truth)
    gross = 10 * jnp.max(jnp.abs(y)) * jr.uniform(k_size, y.shape, y.dtype, -1, 1)
    y = jnp.where(jr.bernoulli(k_where, 0.2, y.shape), gross, y)
    return recovery.Problem(operator, y, recovery.L1(), truth)


def main():
    found = {name: [] for name in METHODS}
    make = jax.jit(
        lambda key: recovery.DenseSensing(
            jr.normal(key, (MEASUREMENTS, SIZE**2)) / MEASUREMENTS**0.5, (SIZE, SIZE)
        )
    )
    for number in range(OPERATORS):
        operator = make(jr.key(number))
        for name in METHODS:
            found[name].append(np.asarray(errors(operator, jr.key(100 + number), name)))
    rows, bounds = [], []
    for name, parts in found.items():
        curves = np.concatenate(parts)
        reached = np.where(
            (curves <= LEVEL).any(axis=1), (curves <= LEVEL).argmax(axis=1), STEPS
        )
        rate = float(recovery.success_rate(curves[:, -1], LEVEL))
        rows.append(
            {
                "what": name,
                "success": rate,
                "draws": len(curves),
                "median steps to 1e-4": float(np.median(reached)),
                "most steps to 1e-4": int(reached.max()),
                "median final error": float(np.median(curves[:, -1])),
                "worst final error": float(curves[:, -1].max()),
            }
        )
        if name == "searched level":
            claim = "success rate over 50 draws, told nothing"
            bounds.append(_harness.bound(claim, rate, at_least=0.95))
    _harness.write_results("recovery_robustness", rows, bounds)


if __name__ == "__main__":
    main()
