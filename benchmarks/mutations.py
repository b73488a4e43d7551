"""Does a test notice? Small mistakes are put into a copy of the library, one at a time.

Each mutant is a file, a piece of its text, what stands there instead, and the tests that
should go red. ``python benchmarks/mutations.py [word …]`` runs those with a word in them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _harness import bound, write_results


ROOT = Path(__file__).parent.parent
REFERENCES = "tests/recipes/test_against_references.py"


def recipe(name, before, after, select=None):
    """A mutant of a recipe, to be found by its dense reference."""
    return (f"recipes/{name}.py", before, after, [REFERENCES, "-k", select or name])


def plugin(path, before, after, select, tests=REFERENCES):
    """A mutant of a plug-in, to be found by a reference of a recipe that uses it."""
    return (f"subspaces/{path}.py", before, after, [tests, "-k", select])


def other(path, before, after, *tests):
    """A mutant anywhere else."""
    return (f"{path}.py", before, after, list(tests))


MUTANTS = [
    recipe("adam_sn", "numerator=optax.ema(b1)", "numerator=optax.ema(b2)"),
    recipe("apollo", "scale: ArrayLike = 1.0", "scale: ArrayLike = 0.25"),
    recipe("coap", "carry=sub.Rotate()", "carry=sub.Keep()"),
    recipe("coap", "step_size: ArrayLike = 0.1", "step_size: ArrayLike = 1.0"),
    recipe("dion", "weight_decay: ArrayLike = 0.01", "weight_decay: ArrayLike = 0.0"),
    recipe(
        "_neurons", "max(outputs / inputs, least)", "max(inputs / outputs, least)", "dion"
    ),
    recipe("_neurons", "0.25 if fraction is None", "0.5 if fraction is None", "dion2"),
    recipe("_neurons", "else min(sides)", "else max(sides)", "dion2"),
    (
        "recipes/_neurons.py",
        "(is_default or not told)",
        "(is_default or told)",
        ["tests/recipes/test_neurons.py", "-k", "kernel or word"],
    ),
    recipe("dion2", 'momentum, "short"', 'momentum, "left"'),
    recipe("dion2", "weight_decay: ArrayLike = 0.01", "weight_decay: ArrayLike = 0.0"),
    recipe("dion3", 'momentum, "left"', 'momentum, "short"'),
    recipe("dion3", "        normalize_rows(b2, eps, where=where),\n", ""),
    recipe("dion3", "b2: ArrayLike = 0.95", "b2: ArrayLike = 0.99"),
    recipe("normuon", "trace(momentum)", "trace(momentum, nesterov=True)"),
    recipe("normuon", "scale / nonzero(size)", "scale + 0 * nonzero(size)"),
    recipe("normuon", "b2: ArrayLike = 0.95", "b2: ArrayLike = 0.99"),
    recipe("psgd_kron", "optax.ema(momentum)", "optax.ema(momentum, debias=False)"),
    recipe("psgd_kron", "size > rms, rms / nonzero(size), 1", "size < 0, rms, 1"),
    recipe("kl_shampoo", "debias=False", "debias=True"),
    other(
        "recipes/kl_shampoo",
        "10000 if max_side is None",
        "9 if max_side is None",
        "tests/transforms/test_kronecker_factors.py -k sides",
    ),
    other(
        "adapters/folds/heads",
        "1 / total)",
        "1.0)",
        "tests/adapters/test_heads.py -k mean_of",
    ),
    other(
        "adapters/folds/rules",
        "site.read() - start",
        "site.read() + start",
        "tests/adapters/test_folds.py -k keeps",
    ),
    other(
        "adapters/folds/rules",
        "dataclasses.replace(now, mask=was.mask, scale=was.scale)",
        "now",
        "tests/adapters/test_folds.py -k masks",
    ),
    other(
        "adapters/folds/rules",
        "beside = lambda was, now: now if isinstance(was, Magnitude) else was",
        "beside = lambda was, now: now",
        "tests/adapters/test_folds.py -k copy_loses",
    ),
    other(
        "adapters/folds/fold",
        "jr.fold_in(key, step)",
        "key",
        "tests/adapters/test_folds.py -k other_numbers",
    ),
    other(
        "adapters/folds/fold",
        "select(due,",
        "select(due | True,",
        "tests/adapters/test_folds.py -k members",
    ),
    other(
        "adapters/folds/moments",
        "jr.uniform(key, first.shape) >= self.fraction",
        "jr.uniform(key, first.shape) < self.fraction",
        "tests/adapters/test_fold_moments.py -k fractions",
    ),
    other(
        "adapters/folds/moments",
        "if anew:",
        "if anew or True:",
        "tests/adapters/test_fold_moments.py -k fractions",
    ),
    other(
        "adapters/folds/_frames",
        "self.overlap**2",
        "self.overlap",
        "tests/adapters/test_fold_moments.py -k formula",
    ),
    other(
        "adapters/folds/_frames",
        "times(cross(new, old), inverse_gram(old))",
        "cross(new, old)",
        "tests/adapters/test_fold_moments.py -k would_have_seen",
    ),
    other(
        "adapters/folds/starts",
        "if own.gate is not None:",
        "if own.gate is None:",
        "tests/adapters/test_folds.py -k frozen_start",
    ),
    other(
        "adapters/folds/schedules",
        "part * end",
        "part * schedule(count)",
        "tests/adapters/test_fold_moments.py -k schedule_is",
    ),
    recipe("fira", "scale: ArrayLike = 0.25", "scale: ArrayLike = 1.0"),
    recipe(
        "fira", "max_growth: ArrayLike | None = 1.01", "max_growth: ArrayLike | None = 2.0"
    ),
    recipe("flora", "lift=sub.Blend(b1)", "lift=sub.Project()"),
    recipe("frugal", "carry=sub.Rotate()", "carry=sub.Keep()"),
    recipe("frugal", "sub.SignResidual(residual)", "sub.SignResidual()"),
    recipe("galore", "scale: ArrayLike = 0.25", "scale: ArrayLike = 1.0"),
    recipe("galore", "rank = 0.25 if", "rank = 0.5 if"),
    recipe("galore_plus", "fraction = 0.01 if", "fraction = 0.1 if"),
    recipe(
        "golore",
        "sub.SVD(rank), sub.RandomOrthonormal(rank)",
        "sub.RandomOrthonormal(rank), sub.SVD(rank)",
    ),
    recipe("grass", "sub.SeededReset(b1, b2)", "sub.SeededReset(b2, b1)"),
    recipe("ldadam", "b1: ArrayLike = 0.908", "b1: ArrayLike = 0.9"),
    recipe("ldadam", "blend=b1", "blend=b2"),
    recipe("ldadam", "sub.ErrorFeedback(b1)", "sub.ErrorFeedback(b2)"),
    recipe("mofasgd", "momentum: ArrayLike = 0.95", "momentum: ArrayLike = 0.9"),
    recipe("online_subspace_descent", "penalty=penalty", "penalty=0.0", "online"),
    recipe("online_subspace_descent", "basis_rate * learning_rate\n", "learning_rate\n"),
    recipe("power_sgd", "lambda g, m: g + m", "lambda g, m: m"),
    recipe("psgd", "clip_rms: ArrayLike | None = 2.0", "clip_rms: ArrayLike | None = 9.0"),
    recipe("q_galore", "threshold=threshold", "threshold=0.9"),
    recipe("sara", "sub.SampledSVD(rank)", "sub.SVD(rank)"),
    recipe("snsm", "carry=sub.Reset()", "carry=sub.Keep()"),
    recipe("soap", "b2 if decay is None", "b1 if decay is None"),
    recipe("subspace_adam", 'when="after"', 'when="before"'),
    recipe("subspace_adam", "blocks = 8 if", "blocks = 4 if"),
    recipe("subtrack", "sub.RotateVariance(b1, b2)", "sub.Rotate()"),
    recipe("sumo", "carry=sub.Rotate()", "carry=sub.Keep()"),
    recipe("_common", "decays if mask is None", "None if mask is None", "galore"),
    plugin("transport", "1 - jnp.sum(squares, axis=-1), 0, 1", "0.0, 0, 1", "ldadam"),
    plugin("transport", "axis=-2), 0, 1)", "axis=-1), 0, 1)", "ldadam"),
    plugin(
        "transport",
        "if self.on_rows:\n            return times(c, x",
        "if True:\n            return times(c, x",
        "coap",
    ),
    plugin("schedules", "context.count + offset", "context.count - offset", "galore"),
    plugin("schedules", "seen > self.window", "seen >= self.window", "q_galore"),
    plugin(
        "lifts",
        "jnp.where(known, jnp.sqrt(whole(outside)), 0)",
        "jnp.sqrt(whole(outside))",
        "residual",
        "tests/subspaces/test_rounding.py",
    ),
    plugin(
        "lifts",
        "jnp.sign(_left_out(x))",
        "jnp.sign(x.gradient)",
        "frugal",
    ),
    plugin(
        "lifts",
        "jnp.abs(outside) > error",
        "jnp.abs(outside) >= 0 * error",
        "sign",
        "tests/subspaces/test_rounding.py",
    ),
    plugin(
        "bases/power", "count % self.blocks", "(count + 1) % self.blocks", "subspace_adam"
    ),
    plugin(
        "bases/tracking",
        "jnp.minimum(sigma * self.step_size, best)",
        "sigma * self.step_size",
        "subtrack",
    ),
    plugin(
        "bases/sampled",
        "rank * nonzero(chosen)",
        "nonzero(chosen)",
        "sampled",
        "tests/subspaces/test_basis.py",
    ),
    plugin(
        "_loop",
        "take = usable & due",
        "take = due & (usable | True)",
        "zero or finite or waits",
        "tests/subspaces/test_loop.py",
    ),
    plugin(
        "_loop",
        "due & ~new.done",
        "due & (new.done ^ new.done)",
        "waits",
        "tests/subspaces/test_loop.py",
    ),
    other(
        "linalg/decompositions/product_svd",
        "[unit_columns(x) for x in tall]",
        "tall",
        "tests/linalg",
    ),
    other("linalg/decompositions/polar", "steps - len(polynomials)", "0", "tests/linalg"),
    other(
        "linalg/decompositions/procrustes",
        "times(u, vt)",
        "times(u, vt).mT",
        "tests/linalg",
        "tests/subspaces/test_loop.py",
    ),
    other("linalg/orthonormalize", "diagonal < 0", "diagonal < -1", "tests/linalg"),
    other(
        "transforms/matrices/momentum/compress_momentum",
        "norms > product_rounding",
        "norms >= 0 * product_rounding",
        "tests/transforms/test_compress_momentum.py",
        "tests/subspaces/test_rounding.py",
    ),
    other(
        "transforms/matrices/curvature/rotate_updates",
        "jnp.abs(turned) > error",
        "jnp.abs(turned) >= 0 * error",
        "tests/subspaces/test_rounding.py",
    ),
    other(
        "transforms/matrices/norms/scale_by_subset_norm",
        "x.shape[-2] <= x.shape[-1]",
        "x.shape[-2] < x.shape[-1]",
        "tests/transforms/test_dense_transforms.py",
    ),
    other(
        "transforms/matrices/norms/normalize_rows",
        "layer_norm(wide) / nonzero(layer_norm(out))",
        "1.0",
        REFERENCES + " -k dion3",
    ),
    other(
        "transforms/matrices/curvature/scale_by_psgd_kron",
        "energy(s) * _square(p), rate)",
        "energy(s) * _square(p), 2 * rate)",
        REFERENCES + " -k psgd_kron",
    ),
    other(
        "transforms/matrices/curvature/scale_by_psgd_kron",
        "jnp.maximum(0.9 * old + 0.1 * size, size)",
        "jnp.maximum(0.5 * old + 0.5 * size, size)",
        REFERENCES + " -k psgd_kron",
    ),
    other(
        "transforms/matrices/curvature/scale_by_psgd_kron",
        "ratio = jnp.sqrt(top(right) / top(left))",
        "ratio = 1.0 + 0 * top(left)",
        "tests/transforms/test_kronecker_factors.py",
    ),
    other(
        "transforms/matrices/curvature/scale_by_kl_shampoo",
        "usable & ~fresh",
        "usable",
        REFERENCES + " -k kl_shampoo",
    ),
    other(
        "transforms/matrices/curvature/scale_by_kl_shampoo",
        "limit**2",
        "limit",
        REFERENCES + " -k kl_shampoo",
        "tests/transforms/test_kronecker_factors.py",
    ),
    other(
        "transforms/wrappers/on_mesh",
        "out = inner.update(*moved, **extra)",
        "out = inner.update(updates, state, params, **extra)",
        "tests/subspaces/test_state_specs.py -k on_mesh",
    ),
    other(
        "transforms/wrappers/every",
        "count % k == 0",
        "count % k == 1",
        "tests/transforms/test_dense_transforms.py",
    ),
    other(
        "transforms/wrappers/quantize_state",
        "step=step",
        "step=None",
        "tests/subspaces/test_quantized.py",
    ),
    other(
        "transforms/factors/preconditioners/scale_by_gram",
        "relative=relative",
        "relative=True",
        "tests/transforms/test_scale_by_gram.py",
    ),
    other(
        "metrics/memory_report",
        "leaf.state_bytes > leaf.adam_bytes",
        "leaf.state_bytes > 9 * leaf.adam_bytes",
        "tests/contract/test_matrices.py",
        "tests/metrics",
    ),
    other(
        "recovery/_center",
        "return basis + outer",
        "return basis - outer",
        "tests/contract/test_equivariant_fits.py",
    ),
    other(
        "recovery/completion/completed",
        "mean_row = columns[:, -1] * scale + center",
        "mean_row = columns[:, -1] * scale",
        "tests/recovery/test_fit_completion.py -k of_one_side",
    ),
    other(
        "recovery/tensors/thresholded",
        "whole = low_rank + center",
        "whole = low_rank - center",
        "tests/recovery/test_tensors.py",
    ),
    other(
        "recovery/tensors/tensor_fit",
        "+ center * _constant(wider)",
        "- center * _constant(wider)",
        "tests/recovery/test_tensors.py",
    ),
    other(
        "linalg/_numerics",
        "lax.Precision.HIGHEST if _in_force() == _OF_BFLOAT16 else None",
        "None",
        "tests/subspaces/test_precision.py",
    ),
]


def survives(mutant) -> bool | None:
    """Whether the tests stay green; None where the text, or a test, is not there."""
    path, before, after, tests = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("lrjax", "tests", "pyproject.toml", "README.md", "docs"):
            source = ROOT / part
            place = shutil.copytree if source.is_dir() else shutil.copy
            place(source, copy / part)
        file = copy / "lrjax" / path
        text = file.read_text()
        if before not in text:
            return None
        file.write_text(text.replace(before, after))
        tests = [word for test in tests for word in _words(test)]
        command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "--no-header", *tests]
        environment = {**os.environ, "PYTHONPATH": folder}
        run = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, check=False
        )
    return {0: True, 1: False}.get(run.returncode)  # 5: no test was selected


def _words(test: str) -> list[str]:
    return test.split(" ") if test.startswith("tests/") else [test]


def main():
    words = sys.argv[1:] or [""]
    rows = []
    for mutant in MUTANTS:
        path, before, after, tests = mutant
        if not any(word in path for word in words):
            continue
        outcome = survives(mutant)
        verdict = {None: "not tried", True: "survives", False: "found"}[outcome]
        row = {"file": path, "before": before, "after": after, "verdict": verdict}
        rows.append(row)
        print(verdict, path, repr(before), "->", repr(after), tests, flush=True)
    survivors = sum(row["verdict"] != "found" for row in rows)
    bounds = [bound(f"survivors of {len(rows)} mutants", survivors, at_most=5)]
    write_results("mutations", rows, bounds)


if __name__ == "__main__":
    main()
