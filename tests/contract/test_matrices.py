"""Which leaves are matrices, and what is refused: the same everywhere."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lrjax
from lrjax import subspaces as sub
from tests.registry import ENTRIES, PARAMS, RECIPES


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


KEY = jax.random.key(7)
BASE = {name: entry for name, entry in RECIPES.items() if "(" not in name}
CHOOSING = {
    name: entry
    for name, entry in BASE.items()
    if "where" in inspect.signature(entry.factory).parameters
}


# Averages and wrappers, right as they are.
TAKES_COMPLEX = {"amplify_slow", "every", "quantize_state"}
REAL = {n: e for n, e in ENTRIES.items() if n.split("(")[0] not in TAKES_COMPLEX}


@pytest.mark.parametrize("entry", REAL.values(), ids=REAL.keys())
def test_complex_leaves_are_refused_by_name(entry):
    params = PARAMS[entry.params](KEY)
    name = "pair" if entry.params == "pairs" else "stack"
    complex_leaf = jax.tree.map(lambda x: x.astype(jnp.complex64), params[name])
    with pytest.raises(TypeError, match=rf"(?s){name}.* complex64"):
        entry.make().init({**params, name: complex_leaf})


@pytest.mark.parametrize("entry", CHOOSING.values(), ids=CHOOSING.keys())
def test_where_may_answer_with_a_numpy_bool(entry):
    params = {"w": jnp.ones((12, 9)), "b": jnp.ones((9,))}
    shapes = lambda where: jax.eval_shape(entry.make(where=where).init, params)
    as_bool = shapes(lambda path, shape: len(shape) == 2)
    assert shapes(lambda path, shape: np.array(shape).size == np.int64(2)) == as_bool
    assert shapes(lambda path, shape: np.bool_(len(shape) == 2)) == as_bool
    none = shapes(None)  # what is chosen by default here
    assert jax.tree.structure(none) == jax.tree.structure(as_bool)


@pytest.mark.parametrize("entry", CHOOSING.values(), ids=CHOOSING.keys())
def test_a_where_that_matches_nothing_is_refused_and_no_where_never_is(entry):
    params = {"b": jnp.ones((9,)), "s": jnp.ones(())}
    with pytest.raises(ValueError, match=r"where= of \w+ chose none of b, s|The recipe"):
        entry.make(where=lambda path, shape: False).init(params)
    for tree in (params, {}, jnp.ones(3)):
        tx = entry.factory(learning_rate=0.1)
        state = jax.eval_shape(tx.init, tree)
        updates, _ = jax.eval_shape(tx.update, tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)


def test_unequal_blocks_are_refused_by_a_sentence():
    grouped = sub.MatrixSpec(blocks=(32, 8, 8))
    tx = lrjax.subspace_adam(0.1, 2, where=lambda path, shape: grouped)
    with pytest.raises(ValueError, match=r"got blocks=\(32, 8, 8\).*blocks=48"):
        tx.init({"qkv": jnp.ones((96, 16))})


def test_the_heads_of_flax_attention_make_one_side_of_a_matrix():
    shapes = {
        "query.kernel": (512, 8, 64),
        "out.kernel": (8, 64, 512),
        "experts.kernel": (4, 32, 64),
    }
    seen = {}
    for path, shape in shapes.items():
        answer = sub.is_hidden_matrix(f"layers.attention.{path}", shape)
        spec = answer if isinstance(answer, sub.MatrixSpec) else sub.MatrixSpec()
        seen[path] = sub.matrix_shape(shape, spec)
    assert seen["query.kernel"] == seen["out.kernel"] == (512, 512)
    assert seen["experts.kernel"] == (4, 32, 64)
    params = {"query": {"kernel": jax.ShapeDtypeStruct((512, 8, 64), jnp.float32)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lrjax.metrics.memory_report(params, lrjax.subspace_adam(0.1))
    assert report.ratio < 0.4


def test_a_leaf_that_costs_more_than_under_adam_is_reported():
    kernel = jax.ShapeDtypeStruct((512, 8, 64), jnp.float32)
    weight = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    tx = lrjax.subspace_adam(0.1, 8, where=lambda path, shape: True)
    with pytest.warns(UserWarning, match=r"more than under Adam: odd \(512, 8, 64\)"):
        report = lrjax.metrics.memory_report({"odd": kernel, "weight": weight}, tx)
    assert "more than Adam" in str(report)


@pytest.mark.parametrize("name", BASE)
def test_what_is_no_matrix_gets_the_fallback(name):
    """Biases, scalars and empty trees: whatever a model holds."""
    if BASE[name].params == "pairs":
        pytest.skip("of trees with factor pairs")
    tree = {"bias": jnp.ones(3), "scalar": jnp.ones(()), "none": None}
    tx = optax.with_extra_args_support(BASE[name].factory(learning_rate=0.1))
    state = jax.eval_shape(tx.init, tree)
    updates, after = jax.eval_shape(tx.update, tree, state, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert jax.tree.structure(after) == jax.tree.structure(state)
