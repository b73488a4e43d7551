"""Do a few searches with steps of several lengths find what one alone loses?

The shapes of `recovery_told_nothing` at the border of what can be recovered. Four members
of one vmap, whose steps are 0.6 to 1.25 times Polyak's, read the operator once for all; the
one of the smallest loss is taken. No member is told anything.
"""

import functools

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from recovery_told_nothing import DRAWS, LEVEL, RANK, SIZE, STEPS, draw

import lrjax
from lrjax import recovery


RATES = (0.6, 0.8, 1.0, 1.25)
BORDER = {(8, 2): (0.1, 0.2, 0.3), (12, 2): (0.3, 0.4), (24, 4): (0.3, 0.4, 0.45)}


@functools.partial(jax.jit, static_argnames="width")
def errors(operator, shares, width):
    """Final errors, ``(shares, draws)``: of the known minimum, one search, and the best."""

    def one(share, key):
        problem, truth = draw(operator, key, share)
        start = lrjax.spectral_init(problem, width, key=key)
        solve = functools.partial(lrjax.solve, problem, init=start, steps=STEPS)
        known = solve(lrjax.opsa(f_min=problem.loss(truth))).x
        member = lambda rate: solve(lrjax.opsa(rate), keep="best").x
        found = jax.vmap(member)(jnp.array(RATES))
        best = jnp.argmin(jax.vmap(problem.loss)(found))
        take = lambda index: jax.tree.map(lambda a: a[index], found)
        return [problem.relative_error(x) for x in (known, take(2), take(best))]

    draws = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(draws, in_axes=(0, None))(shares, jr.split(jr.key(1), DRAWS))


def main():
    rows = []
    for (factor, width), shares in BORDER.items():
        count = factor * SIZE * RANK
        matrices = jr.normal(jr.key(0), (count, SIZE**2)) / count**0.5
        operator = recovery.DenseSensing(matrices, (SIZE, SIZE))
        found = errors(operator, jnp.array(shares), width)
        counts = [(np.asarray(e) <= LEVEL).sum(axis=1).tolist() for e in found]
        for share, known, single, best in zip(shares, *counts, strict=True):
            rows.append(
                {
                    "measurements": f"{factor} n r",
                    "width": width,
                    "outliers": share,
                    "known minimum: draws": known,
                    "told nothing: draws": single,
                    f"told nothing, best of {len(RATES)}: draws": best,
                }
            )
    best = f"told nothing, best of {len(RATES)}: draws"
    lost = max(row["known minimum: draws"] - row[best] for row in rows)
    claim = f"draws of {DRAWS} lost by the best of {len(RATES)}, most"
    _harness.write_results(
        "recovery_members", rows, [_harness.bound(claim, lost, at_most=1)]
    )


if __name__ == "__main__":
    main()
