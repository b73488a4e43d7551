"""What does a vmapped sweep gain over the warm Python loop when the operator is shared?

The tour's 32 members: a robust sensing problem under 8 first steps × 4 decays of the step.
"""

import jax
from _harness import bound, compiled_cost, interleaved, median_ratio, medians, write_results

from lrjax._tour import sweep as part


def main():
    problem, start, grid = part.setting()
    vectorized, loop = part.contestants(problem, start, grid)
    seconds = interleaved({"loop": loop, "sweep": vectorized}, repeats=20)
    one = lambda problem, start: part.descend(problem, start, first_step=0.1, decay=0.9)
    all_at_once = lambda problem, start, points: jax.vmap(
        lambda point: part.descend(problem, start, **point)
    )(points)
    points = {"first_step": jax.numpy.ones(32), "decay": jax.numpy.ones(32)}
    costs = {
        "loop": compiled_cost(one, problem, start),
        "sweep": compiled_cost(all_at_once, problem, start, points),
    }
    rows = [
        {"run as": name, "seconds for 32": medians(seconds)[name], **costs[name]}
        for name in ("loop", "sweep")
    ]
    ratio = median_ratio(seconds, "loop", "sweep")
    write_results("sweep_vs_loop", rows, [bound("loop over sweep", ratio, at_least=3.0)])


if __name__ == "__main__":
    main()
