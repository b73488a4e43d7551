"""Does one default serve every width on a real scene, and is it the nuclear norm's doing?

Indian Pines (21025 pixels, 200 bands; from tensorly), a tenth of the entries set to 0 or 1,
a tenth missing. Width by width: fit_robust_pca; OPSA, scaled l1 descent on factors
with the nuclear-norm term; the same without it. Nothing is tuned to a width.
"""

import functools
import time

import _harness
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import lrjax


WIDTHS = (5, 10, 20, 40)
SALT, MISSING = 0.1, 0.1
STEPS, FIRST, DECAY = 150, 0.15, 0.95  # of OPSA: lengths FIRST · ‖start‖ · DECAY^t
WEIGHT = 0.4  # of its nuclear norm, times the square root of the longer side
LIMIT = 0.036  # relative error, at every width from 10 on


def scene():
    """The clean scene with maximum one, the corrupted one, and what is seen of it."""
    import tensorly.datasets

    cube = np.asarray(tensorly.datasets.load_indian_pines().tensor, np.float32)
    clean = cube.reshape(-1, cube.shape[-1]) / cube.max()
    rng = np.random.default_rng(0)
    salt = rng.integers(0, 2, clean.shape).astype(np.float32)
    dirty = np.where(rng.random(clean.shape) < SALT, salt, clean)
    return jnp.asarray(clean), jnp.asarray(dirty), rng.random(clean.shape) >= MISSING


@functools.partial(jax.jit, static_argnames="width")
def convex(dirty, mask, width):
    return lrjax.fit_robust_pca(dirty, mask=mask, rank=width).low_rank


@functools.partial(jax.jit, static_argnames="width")
def descent(dirty, mask, weight, width):
    """OPSA by steps of falling length; the weight is that of the term."""
    problem = lrjax.robust_pca.from_data(dirty, mask)
    start = lrjax.spectral_init(problem, width, key=jr.key(0))
    first = FIRST * lrjax.norm(start)
    rate = lambda count: first * DECAY**count
    tx = lrjax.opsa(rate, f_min=None, nuclear_weight=weight)
    return lrjax.solve(problem, tx, start, steps=STEPS).x


def main():
    clean, dirty, mask = scene()
    mask = jnp.asarray(mask)
    natural = max(clean.shape) ** 0.5  # the scale of the weight in pursuit
    methods = {
        "fit_robust_pca": convex,
        "OPSA": functools.partial(descent, weight=WEIGHT * natural),
        "OPSA, no term": functools.partial(descent, weight=0.0),
    }
    rows, bounds = [], []
    for width in WIDTHS:
        for name, method in methods.items():
            begin = time.perf_counter()
            x = jax.block_until_ready(method(dirty, mask, width=width))
            seconds = time.perf_counter() - begin
            difference = x.materialize() - clean
            error = float(jnp.linalg.norm(difference) / jnp.linalg.norm(clean))
            row = {"method": name, "width": width, "error": error}
            rows.append(row | {"seconds with compilation": seconds})
            print(rows[-1], flush=True)
            if width >= 10 and name != "OPSA, no term":
                claim = f"error of {name}, width {width}"
                bounds.append(_harness.bound(claim, error, at_most=LIMIT))
    _harness.write_results("recovery_scenes", rows, bounds, "tensorly")


if __name__ == "__main__":
    main()
