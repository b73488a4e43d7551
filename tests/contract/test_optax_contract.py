"""optax's own contract test for contributed optimizers, unmodified, on every recipe.

The test ships inside optax as a class of absl whose methods are expanded over optax's own
list. It is imported with that expansion switched off, so that its methods can be called
with our recipes in the place of those of ``optax.contrib``.
"""

import functools
import importlib
import inspect
from unittest import mock

import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized

from tests.registry import RECIPES


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def _as_written(*args, **kwargs):
    return lambda function: function


@functools.cache
def contract():
    """The module of the test, its methods waiting for their arguments."""
    with mock.patch.object(parameterized, "product", _as_written):
        return importlib.import_module("optax.contrib._common_test")


FACTORIES = {
    entry.factory: (name.split("(")[0], entry.drop_in)
    for name, entry in reversed(RECIPES.items())
}
NAMES = {name: drop_in for name, drop_in in FACTORIES.values()}
TARGETS = ("parabola", "rosenbrock", "matrix_parabola", "mixed_tensor_target")
NARROW_AND_WIDE = ("bfloat16", "float32")
ALL_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
every = pytest.mark.parametrize("name", sorted(NAMES))


@pytest.fixture
def run(monkeypatch):
    """Call one of optax's tests on one of our recipes."""
    for factory, (name, _) in FACTORIES.items():
        monkeypatch.setattr(optax.contrib, name, factory, raising=False)

    def call(test, name, **arguments):
        case = contract().ContribTest(test)
        arguments = {
            "opt_name": name,
            "opt_kwargs": NAMES[name],
            "wrapper_name": None,
            "wrapper_kwargs": None,
            **arguments,
        }
        getattr(case, test)(**arguments)

    return call


def test_every_test_of_optax_is_run_on_every_recipe():
    methods = inspect.getmembers(contract().ContribTest, inspect.isfunction)
    theirs = {name for name, _ in methods if name.startswith("test_")}
    ours = inspect.getsource(inspect.getmodule(_as_written))
    assert theirs
    assert {name for name in theirs if f'"{name}"' not in ours} == set()
    learning = {
        name
        for name, entry in RECIPES.items()
        if "learning_rate" in inspect.signature(entry.factory).parameters
    }
    assert {name.split("(")[0] for name in learning} == set(NAMES)


@every
def test_extra_arguments_and_a_single_compilation(name, run):
    run("test_optimizers_accept_extra_args", name, wrap=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@every
def test_reaches_the_target(name, target, run):
    setup = getattr(contract(), f"_setup_{target}")
    run("test_optimizers", name, target=setup, dtype="float32")


@every
def test_inject_hyperparams(name, run):
    run("test_optimizers_can_be_wrapped_in_inject_hyperparams", name)


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE)
@every
def test_updates_have_the_dtype_of_the_parameters(name, dtype, run):
    run("test_preserve_dtype", name, dtype=dtype)


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE)
@every
def test_gradients_are_accumulated(name, dtype, run):
    run("test_gradient_accumulation", name, dtype=dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@every
def test_states_keep_shape_and_dtype(name, dtype, run):
    run("test_state_shape_dtype_shard_stability", name, dtype=dtype)


@every
def test_schedules(name, run):
    run("test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such", name)
