"""Does dense sensing run at the speed of the memory, and are further members free?"""

import functools

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr

import lrjax


SIZE, RANK, MEASUREMENTS, MEMBERS, STEPS = 100, 10, 8000, 32, 8


@jax.jit
def plain(rows, vector):
    """A matrix-vector product and nothing else, as often as a run reads the operator."""

    def body(_, v):
        # The next product depends on the last: none can be left out.
        return v + 1e-30 * jnp.sum(rows @ v)

    return jax.lax.fori_loop(0, 2 * STEPS, body, vector)


@functools.partial(jax.jit, static_argnames=())
def descend(problem, start):
    """Steps of the scaled subgradient method: every one reads the operator twice."""
    tx = lrjax.scaled_subgradient(f_min="search")
    return lrjax.solve(problem, tx, start, steps=STEPS).x


def main():
    problem = lrjax.matrix_sensing(
        jr.key(0), (SIZE, SIZE), RANK, MEASUREMENTS, outlier_fraction=0.1
    )
    start = lrjax.spectral_init(problem, RANK, key=jr.key(1))
    noise = jr.normal(jr.key(2), (MEMBERS, *start.left.shape)) * 1e-2
    starts = jax.vmap(lambda z: lrjax.LowRank(start.left + z, start.right + z))(noise)
    members = jax.jit(jax.vmap(descend, in_axes=(None, 0)))
    matrices = problem.operator.matrices
    vector = jnp.ones(matrices.shape[1])
    seconds = _harness.interleaved(
        {
            "plain": lambda: plain(matrices, vector),
            "one": lambda: descend(problem, start),
            "members": lambda: members(problem, starts),
        }
    )
    median = _harness.medians(seconds)
    traffic = 2 * STEPS * matrices.nbytes
    rows_of_table = [
        {
            "what": name,
            "seconds per step": median[name] / STEPS,
            "GB per second": traffic / median[name] / 1e9,
        }
        for name in seconds
    ]
    cost = _harness.compiled_cost(jax.vmap(descend, in_axes=(None, 0)), problem, starts)
    rows_of_table.append(
        {"what": "members, compiled", **cost, "operator bytes": matrices.nbytes}
    )
    bounds = [
        _harness.bound(
            "bandwidth of a step over that of a matrix-vector product",
            _harness.median_ratio(seconds, "plain", "one"),
            at_least=0.7,
        ),
        _harness.bound(
            f"seconds of {MEMBERS} members over those of one",
            _harness.median_ratio(seconds, "members", "one"),
            at_most=4.0,
        ),
    ]
    _harness.write_results("recovery_sensing", rows_of_table, bounds)


if __name__ == "__main__":
    main()
