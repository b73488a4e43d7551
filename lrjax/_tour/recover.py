"""A real hyperspectral scene from corrupted pixels, its rank unknown."""

import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..linalg import gram
from ..lowrank import LowRank, norm
from ..recipes import opsa
from ..recovery import Problem, robust_pca, solve, spectral_init
from .report import Check, Report


TITLE = "recover: 21,025 × 200 Indian Pines, 10 % wrong, 10 % missing, rank unknown"
SALT, MISSING = 0.1, 0.1
BOUND = 0.036
# In units of the norm of the start. The last is far too long, to see that nothing breaks.
FIRST_STEPS = (0.15, 0.5, 1.5)
TOO_LONG = 100.0
DECAY = 0.95
BAND = 120  # the band that is drawn


def run(out: pathlib.Path, quick: bool) -> Report:
    """Recover Indian Pines at several widths, by three methods, and draw one band."""
    scene = _load()
    matrix, mask = _corrupt(scene)
    problem = robust_pca.from_data(matrix, mask, truth=scene.reshape(matrix.shape))
    widths, steps = ((10, 20), 100) if quick else ((5, 10, 20), 150)
    rows, checks, fits, wrong = [], [], {}, 0
    for width in widths:
        start = _start(problem, width)
        size = float(norm(start))
        firsts = FIRST_STEPS if width == 10 and not quick else FIRST_STEPS[:1]
        for first in firsts:
            row, x = _timed(_opsa, problem, start, first * size, steps)
            rows.append({"method": "OPSA", "width": width, "first step": first} | row)
            fits.setdefault(width, x)
            wrong += _not_finite(x)
        error = float(problem.relative_error(fits[width]))
        if width in (10, 20):
            checks.append(Check(f"relative error of OPSA at width {width}", error, BOUND))
        if width == 10:
            far = _opsa(problem, start, TOO_LONG * size, steps)
        if width == 20 or not quick:
            row, _ = _timed(_subgradient, problem, start, 0.03 * size**0.5, steps)
            rows.append({"method": "subgradient", "width": width, "first step": 0.03} | row)
        row, svd_fit = _timed(_svd, problem, mask, width)
        rows.append({"method": "truncated SVD", "width": width, "first step": ""} | row)
    figure = _draw(out, scene, matrix, mask, svd_fit, fits[20])
    checks += [
        Check("numbers not finite in the fits of OPSA above", wrong, 0),
        Check(f"numbers not finite, first step {TOO_LONG:g} ‖X‖", _not_finite(far), 0),
    ]
    return Report(TITLE, tuple(rows), tuple(checks), (figure,))


def _load() -> jax.Array:
    """The scene ``(145, 145, 200)``, scaled to a maximum of one."""
    try:
        from tensorly.datasets import load_indian_pines
    except ImportError as error:
        raise ImportError(
            "the scene ships in tensorly: pip install 'lrjax[tour]'"
        ) from error
    scene = np.asarray(load_indian_pines().tensor, np.float32)
    return jnp.asarray(scene / scene.max())


def _corrupt(scene: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A share of the entries set to zero or one, and a share not observed."""
    rng = np.random.default_rng(0)
    matrix = np.array(scene.reshape(-1, scene.shape[-1]))
    salt = rng.random(matrix.shape) < SALT
    matrix[salt] = rng.integers(0, 2, salt.sum())
    mask = rng.random(matrix.shape) >= MISSING
    return jnp.asarray(matrix), jnp.asarray(mask)


@partial(jax.jit, static_argnums=1)
def _start(problem: Problem, width: int) -> LowRank:
    return spectral_init(problem, width, key=jax.random.key(0))


@partial(jax.jit, static_argnums=3)
def _opsa(problem: Problem, start: LowRank, first: jax.Array, steps: int) -> LowRank:
    """One setting for every width: nothing about the rank or the noise."""
    schedule = lambda count: first * DECAY**count
    weight = 0.4 * max(problem.shape) ** 0.5
    tx = opsa(schedule, f_min=None, nuclear_weight=weight)
    return _blind(problem, tx, start, steps)


@partial(jax.jit, static_argnums=3)
def _subgradient(problem: Problem, start: LowRank, first: jax.Array, steps: int) -> LowRank:
    """The same steps along the plain subgradient."""
    tx = optax.chain(
        optax.normalize_by_update_norm(),
        optax.scale_by_learning_rate(lambda count: first * DECAY**count),
    )
    return _blind(problem, tx, start, steps)


def _blind(problem, tx, start, steps) -> LowRank:
    """Solve without the truth, which would be measured in every step."""
    blind = Problem(problem.operator, problem.targets, problem.objective)
    return solve(blind, tx, start, steps=steps).x


@partial(jax.jit, static_argnums=2)
def _svd(problem: Problem, mask: jax.Array, width: int) -> LowRank:
    """The best approximation of the observed matrix, zeros where nothing is observed."""
    observed = problem.targets / jnp.mean(mask)
    right = jnp.linalg.eigh(gram(observed))[1][:, -width:]
    return LowRank(observed @ right, right)


def _timed(method, problem: Problem, *args) -> tuple[dict, LowRank]:
    begin = time.perf_counter()
    x = jax.block_until_ready(method(problem, *args))
    seconds = time.perf_counter() - begin
    return {"relative error": float(problem.relative_error(x)), "seconds": seconds}, x


def _not_finite(x: LowRank) -> int:
    return sum(int((~jnp.isfinite(factor)).sum()) for factor in (x.left, x.right))


def _draw(out, scene, matrix, mask, svd_fit, fit) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    side = scene.shape[:2]
    band = lambda x: np.asarray(x)[:, BAND].reshape(side)
    damaged = np.where(np.asarray(mask), np.asarray(matrix), np.nan)
    one_band = lambda x: x.left @ x.right[BAND]
    pictures = {
        "the scene": band(scene.reshape(matrix.shape)),
        "given: 10 % salt, 10 % missing": band(damaged),
        "truncated SVD": np.asarray(one_band(svd_fit)).reshape(side),
        "OPSA, width 20": np.asarray(one_band(fit)).reshape(side),
    }
    low, high = np.percentile(pictures["the scene"], (1, 99))
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    colors = plt.get_cmap("viridis").with_extremes(bad="white")
    for ax, (name, picture) in zip(axes, pictures.items(), strict=True):
        ax.imshow(picture, vmin=low, vmax=high, cmap=colors, interpolation="nearest")
        ax.set_title(f"{name} (band {BAND})" if name == "the scene" else name)
        ax.axis("off")
    path = out / "recover.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name
