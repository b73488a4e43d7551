import gc
import os
import random

import jax
import jax.random as jr
import jaxtyping
import matplotlib
import psutil
import pytest


# Most of the suite's time is compilation of small programs. Without LLVM's optimizations,
# XLA's MLIR code generator and parallel code generation it takes a quarter of the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
# Eight devices share this pool. A collective blocks a thread until all devices are there,
# so that with a thread for each core, two, a decomposition may never get one: a deadlock.
os.environ.setdefault("NPROC", "32")
# Each of these threads may call LAPACK. OpenBLAS would let all cores share in every call,
# and threads that wait for their share spin: a batch of decompositions takes ten times as
# long, and eighty times where other programs want the cores as well.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)  # nor the keys to look there
matplotlib.use("Agg")


class _SharedContext:
    """The MLIR context of all programs, but for those that are written within another one.

    JAX makes a new one for each program, which is 15 % of the time of a file of small ones
    (``tests/recipes/test_any_tree.py``: 18.0 s of processor time, and 15.3 with this).
    """

    def __init__(self, make, current):
        self.make, self.current, self.context = make, current, None

    def __call__(self):
        if self.current() is not None:  # another program is being written here
            return self.make()
        if self.context is None:
            self.context = self.make()
        return self.context


def _share_contexts():
    """Share them where JAX has its private names still; elsewhere the tests take longer."""
    try:
        from jax._src.interpreters import mlir

        context = mlir.ir.Context
        mlir.make_ir_context = _SharedContext(mlir.make_ir_context, lambda: context.current)
    except (ImportError, AttributeError):
        return None
    return mlir.make_ir_context


SHARED = _share_contexts()


@pytest.fixture
def x64():
    """Run one test with 64-bit types."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def shapes_unchecked():
    """Without jaxtyping, which takes a third of the time of what is only traced.

    For tables over many layouts, trees and frameworks, of parts whose annotations
    ``test_every_transform`` checks.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class _GetKey:
    """A stream of fresh keys whose seed shows in the report of a failing test."""

    def __init__(self):
        self.seed = int(os.environ.get("LRJAX_SEED", random.SystemRandom().getrandbits(31)))
        self.count = 0

    def __call__(self):
        self.count += 1
        return jr.fold_in(jr.key(self.seed), self.count)

    def __repr__(self):
        return f"getkey(replay with LRJAX_SEED={self.seed})"


@pytest.fixture
def getkey(request):
    """New keys for each test; ``LRJAX_SEED=… pytest`` replays a failure."""
    keys = _GetKey()
    yield keys
    report = getattr(request.node, "rep_call", None)
    if report is not None and report.failed:
        print(f"\nreplay with LRJAX_SEED={keys.seed}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    setattr(item, f"rep_{report.when}", report)


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Small programs serve many files, until all together take too much memory."""
    yield
    if psutil.Process().memory_info().rss > 2.5e9:
        jax.clear_caches()
        if SHARED is not None:
            SHARED.context = None


def pytest_collection_finish():
    """What is imported and collected by now stays: no collection of garbage visits it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    _mark_slow(config, items)
    if "accelerator" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="compiled for accelerators by -m accelerator alone")
        for item in items:
            if item.get_closest_marker("accelerator"):
                item.add_marker(skip)
    # The long ones first, so that no worker is left alone with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _mark_slow(config, items):
    """Mark examples of docstrings slow, and the rows that ``slow_but`` does not name."""
    named, found = set(), set()
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)
        if (mark := item.get_closest_marker("slow_but")) is None:
            continue
        test = item.nodeid.partition("[")[0]
        named |= {(test, row) for row in mark.args}
        found.add((test, item.callspec.id))
        if item.callspec.id not in mark.args:
            item.add_marker(pytest.mark.slow)
    if named - found and not any("[" in argument for argument in config.args):
        raise pytest.UsageError(f"slow_but: no such rows: {sorted(named - found)}")
