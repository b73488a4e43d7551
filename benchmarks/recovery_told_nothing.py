"""Is a method that is told nothing as good as one that knows the smallest loss?

Success over 20 draws, n = 20, r = 2, condition 20, for every share of outliers up to 45 %,
8 to 24 n r measurements, factors of one to five times the rank. Both take the same steps
with the same damping; one knows the loss at the truth, the other searches for it. All
draws and shares of one shape are members of one vmap over one operator: one compilation
for each shape. Steps are counted, so that the load of the machine does not matter.
"""

import functools

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lrjax
from lrjax import recovery


SIZE, RANK, DRAWS, STEPS, LEVEL = 20, 2, 20, 1000, 1e-4
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.45)
SHAPES = tuple((factor, RANK * wide) for factor in (8, 12, 24) for wide in (1, 2, 5))
METHODS = ("known minimum", "told nothing")


@functools.partial(jax.jit, static_argnames="width")
def errors(operator, shares, width):
    """Relative errors before every step, ``(shares, draws, steps)`` of both methods."""

    def one(share, key):
        problem, truth = draw(operator, key, share)
        start = lrjax.spectral_init(problem, width, key=key)
        known = lrjax.opsa(f_min=problem.loss(truth))
        return [
            lrjax.solve(problem, tx, start, steps=STEPS).history.relative_error
            for tx in (known, lrjax.opsa())
        ]

    draws = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(draws, in_axes=(0, None))(shares, jr.split(jr.key(1), DRAWS))


def draw(operator, key, share):
    """A truth and its measurements, of which a share is replaced by gross errors."""
    k_left, k_right, k_where, k_size = jr.split(key, 4)
    values = jnp.linspace(1.0, 1 / 20, RANK)[None, :]
    columns = lambda k: lrjax.linalg.orthonormalize(jr.normal(k, (SIZE, RANK)))
    truth = lrjax.balance(lrjax.LowRank(columns(k_left) * values, columns(k_right)))
    y = operator(truth)
    gross = 10 * jnp.max(jnp.abs(y)) * jr.uniform(k_size, y.shape, y.dtype, -1, 1)
    y = jnp.where(jr.uniform(k_where, y.shape) < share, gross, y)
    return recovery.Problem(operator, y, recovery.L1(), truth), truth


def steps_to_level(curves):
    """The step at which each draw is first below the level."""
    below = curves <= LEVEL
    return np.where(below.any(axis=-1), below.argmax(axis=-1), STEPS)


def main():
    rows = []
    for factor, width in SHAPES:
        count = factor * SIZE * RANK
        matrices = jr.normal(jr.key(0), (count, SIZE**2)) / count**0.5
        operator = recovery.DenseSensing(matrices, (SIZE, SIZE))
        found = [np.asarray(e) for e in errors(operator, jnp.array(SHARES), width)]
        for index, share in enumerate(SHARES):
            row = {"measurements": f"{factor} n r", "width": width, "outliers": share}
            for name, curves in zip(METHODS, found, strict=True):
                steps = steps_to_level(curves[index])
                row[f"{name}: draws"] = int((curves[index][:, -1] <= LEVEL).sum())
                row[f"{name}: median steps"] = float(np.median(steps))
            rows.append(row)
    lost = [row["known minimum: draws"] - row["told nothing: draws"] for row in rows]
    solved = [row for row in rows if row["known minimum: draws"] == DRAWS]
    longer = [
        row["told nothing: median steps"] / row["known minimum: median steps"]
        for row in solved
    ]
    bounds = [
        _harness.bound(
            "draws of 20 lost by being told nothing, most", max(lost), at_most=1
        ),
        _harness.bound(
            "median steps told nothing over known, most", max(longer), at_most=3
        ),
        _harness.bound(
            "median steps told nothing over known, median", np.median(longer), at_most=2
        ),
    ]
    _harness.write_results("recovery_told_nothing", rows, bounds)


if __name__ == "__main__":
    main()
