"""What every transform, recipe and plug-in must do, whatever its mathematics.

Nearly all the time goes into tracing and compiling. So a check is one compiled program
where it can be, on the smallest tree on which it means something, and what several of them
compare with is computed once (``tests/contract/conftest.py`` sorts the tests by entry).
"""

import functools
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lrjax
from tests.helpers import assert_close, random_low_rank, relative_error, split_factors
from tests.registry import ENTRIES, PARAMS, PLUGINS, RECIPES, loss, value_and_grad


ALL = {**ENTRIES, **PLUGINS}
KEY = jr.key(7)


def those(condition, among=ENTRIES):
    """Only the entries for which a property is claimed."""
    chosen = {name: e for name, e in among.items() if condition(e)}
    return pytest.mark.parametrize("entry", chosen.values(), ids=chosen.keys())


every = those(lambda e: True, ALL)


def has_kernels(entry):
    """Whether it is no mere composition of parts that are compared number by number."""
    return not entry.composed_of


def problem(entry, dtype=jnp.float32):
    params = PARAMS[entry.params](KEY, dtype)
    value, grads = value_and_grad(params)
    return params, value, grads


# What is bound to the tree of the registry.
OF_ONE_TREE = ENTRIES["project_out"], ENTRIES["scale_by_width"]


def small(entry):
    """One matrix, three or a pair by their nature, and a vector: enough for most checks."""
    params = PARAMS[entry.params](KEY)
    if entry is ENTRIES["project_out"]:
        return params
    return {name: params[name] for name in ("stack", "bias")}


def jitted(tx):
    """A transform as two programs."""
    return optax.GradientTransformationExtraArgs(jax.jit(tx.init), jax.jit(tx.update))


@functools.lru_cache(maxsize=1)
def compiled(entry):
    """The entry as programs that all that is asked of it can share."""
    tx = entry.make()
    chex.clear_trace_counter()  # it counts by the place in this file
    update = chex.assert_max_traces(lambda *args, **extra: tx.update(*args, **extra), n=1)
    return jitted(tx._replace(update=update))


def one_update(tx, state, params):
    """What a transform returns for the gradients at these parameters."""
    value, grads = value_and_grad(params)
    return tx.update(grads, state, params, value=value, grad=grads)


def step(tx, state, params, **extra):
    """One update with everything that some transform asks for."""
    value, grads = value_and_grad(params)
    return tx.update(grads, state, params, value=value, grad=grads, **extra)


def run(tx, params, steps=3):
    """A few steps of training in one program."""

    def body(carry, _):
        params, state = carry
        updates, state = step(tx, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(body, (params, tx.init(params)), length=steps)


@functools.lru_cache(maxsize=1)
def training(entry):
    """The updates of a few steps, of the entry's numbers and a factor of the parameters."""

    def updates(point, scale):
        params = jax.tree.map(lambda x: x * scale, small(entry))
        return run(entry.make(**point), params)[1]

    return jax.jit(updates)


@functools.lru_cache(maxsize=1)
def apart(entry):
    """Those with the entry's own numbers, and with the other ones."""
    points = [{name: entry.arguments[name] for name in entry.numbers}, entry.numbers]
    points = [{name: np.asarray(x) for name, x in point.items()} for point in points]
    return [jax.device_get(training(entry)(point, np.float32(1))) for point in points]


@those(has_kernels, ALL)
def test_jit_is_eager_and_compiles_once(entry):
    params, tx = small(entry), compiled(entry)
    updates, state = one_update(tx, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    params = optax.apply_updates(params, updates)  # for another gradient
    got, _ = one_update(tx, state, params)
    want, _ = step(entry.make(), state, params, an_unknown_extra_argument=1)
    assert_close(got, want, condition=100)


@those(has_kernels, ALL)
def test_restored_states_continue_bit_for_bit(entry, tmp_path):
    params, tx = small(entry), compiled(entry)
    shapes = jax.eval_shape(tx.init, params)
    if not jax.tree.leaves(shapes):
        return  # nothing to store
    _, state = one_update(tx, tx.init(params), params)
    want, _ = one_update(tx, state, params)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    restored = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", shapes)
    assert_close(one_update(tx, restored, params)[0], want, rtol=0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", shapes)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_close(one_update(tx, restored, params)[0], want, rtol=0)


DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


def of_all_dtypes(entry):
    """Trees of parameters: all dtypes in one, so that none leaves its mark on another."""
    if entry.composed_of or entry in PLUGINS.values():
        return [PARAMS[entry.params](KEY, jnp.bfloat16)]
    if entry in OF_ONE_TREE:
        return [PARAMS[entry.params](KEY, dtype) for dtype in DTYPES]
    return [{dtype.__name__: PARAMS[entry.params](KEY, dtype) for dtype in DTYPES}]


@every
def test_dtypes_shapes_and_structure_are_fixed_points(entry, x64):
    tx = entry.make()
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for params in of_all_dtypes(entry):
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(lambda s, p: step(tx, s, p), state, params)
        assert types(updates) == types(params)
        assert types(new_state) == types(state)


@every
def test_state_holds_plain_arrays(entry):
    params = PARAMS[entry.params](KEY)
    for leaf in jax.tree.leaves(entry.make().init(params)):
        assert isinstance(leaf, jax.Array)
        assert leaf.size > 0
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@those(lambda e: e.numbers or has_kernels(e), ALL)
def test_vmap_over_hyperparameters_is_a_loop(entry):
    """Whatever becomes of another member of the sweep."""
    grid = {
        name: np.array([entry.arguments[name], other, other])
        for name, other in entry.numbers.items()
    }
    scale = np.float32([1, 1, np.nan])
    together = jax.vmap(training(entry))
    if entry.composed_of:  # its parts are compared number by number
        jax.eval_shape(together, grid, scale)
        return
    want = jax.tree.map(lambda *x: np.stack(x), *apart(entry))
    got = jax.tree.map(lambda x: np.asarray(x)[:2], together(grid, scale))
    assert_close(got, want, condition=1e3)


@those(lambda e: e.stacks and has_kernels(e), ALL)
def test_a_stack_is_a_loop_over_its_layers(entry):
    params = small(entry)
    _, grads = value_and_grad(params)

    def second(tx, params, grads):
        state = tx.init(params)
        for scale in (1.0, -0.5):
            g = jax.tree.map(lambda x, by=scale: by * np.asarray(x), grads)
            updates, state = tx.update(g, state, params, value=jnp.float32(0.7), grad=g)
        return updates["stack"]

    alone = jitted(entry.make())
    whole = second(compiled(entry), params, grads)
    for layer in range(3):
        cut = lambda t, at=layer: jax.tree.map(lambda x: np.asarray(x)[at], t)
        one = [tree | {"stack": cut(tree["stack"])} for tree in (params, grads)]
        assert_close(cut(whole), second(alone, *one), condition=1e3)


@those(lambda e: e.numbers)
def test_inject_hyperparams_changes_nothing(entry):
    params = small(entry)
    # Strings, flags and None are not numbers; arguments that are functions are static.
    static = (*entry.static, *(k for k, v in entry.arguments.items() if callable(v)))
    injected = optax.inject_hyperparams(entry.factory, static_args=static)(
        **entry.arguments
    )
    assert set(entry.numbers) <= set(jax.eval_shape(injected.init, params).hyperparams)
    if entry.composed_of:
        return  # that its numbers may be traced is known from vmap
    got = jax.jit(lambda p: run(injected, p)[1])(params)
    assert_close(got, apart(entry)[0], condition=1e3)


@those(lambda e: "learning_rate" in e.arguments and has_kernels(e))
def test_learning_rate_may_be_a_schedule(entry):
    schedule = lambda count: jnp.where(count < 2, entry.arguments["learning_rate"], 0.0)
    tx = entry.make(learning_rate=schedule)
    updates = jax.jit(lambda p: run(tx, p)[1])(small(entry))
    first = lambda tree, i: jax.tree.map(lambda x: np.asarray(x)[i], tree)
    assert_close(first(updates, 0), first(apart(entry)[0], 0), condition=100)
    if not entry.arguments.get("rebalance"):
        assert not any(np.any(x) for x in jax.tree.leaves(first(updates, 2)))


@those(lambda e: has_kernels(e) and not e.couples)
def test_multi_steps_and_partition(entry):
    params, tx, is_node = small(entry), compiled(entry), lrjax.is_low_rank
    plain, _ = one_update(tx, tx.init(params), params)
    multi = jitted(optax.MultiSteps(entry.make(), every_k_schedule=2))
    state = multi.init(params)
    for _ in range(2):  # the second of two equal gradients acts
        got, state = one_update(multi, state, params)
    assert_close(got, plain, condition=1e3)
    if entry.extra:
        return

    def label(tree):
        name = lambda x: "matrix" if is_node(x) or x.ndim > 1 else "vector"
        return jax.tree.map(name, tree, is_leaf=is_node)

    parts = {"matrix": entry.make(), "vector": optax.sgd(1.0)}
    parted = jitted(optax.partition(parts, label))
    got, _ = one_update(parted, parted.init(params), params)
    assert_close(got["stack"], plain["stack"], condition=1e3)
    assert_close(got["bias"], -value_and_grad(params)[1]["bias"])


PARAMETER = object()
# Those that a transform leaves alone, and moments that are kept as codes.
LEAVES_OF_A_STATE = (
    optax.MaskedNode,
    lrjax.subspaces.BlockQuantized,
    lrjax.subspaces.PackedQuantized,
)


@those(lambda e: e is not ENTRIES["project_out"])  # its bases are data of the caller
def test_map_params_reaches_all_that_belongs_to_a_parameter(entry):
    params, _, _ = problem(entry)
    tx = entry.make()
    state = jax.eval_shape(tx.init, params)
    marked = optax.tree.map_params(
        tx,
        lambda own, parameter: jax.tree.map(lambda x: PARAMETER, own),
        state,
        params,
        is_leaf=lambda x: isinstance(x, LEAVES_OF_A_STATE),
    )
    for x in jax.tree.leaves(marked):
        # Counters and the like, and the inner products of a window of gradients.
        assert x is PARAMETER or x.size <= 3 or x.shape == (3, 3)


@every
def test_zero_gradients_give_finite_numbers(entry):
    params, tx = small(entry), compiled(entry)
    if entry.params == "dense":  # tall and wide ones
        params, tx = PARAMS["dense"](KEY), jitted(entry.make())
    value, grads = value_and_grad(params)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    update = lambda p: tx.update(zeros, tx.init(p), p, value=value, grad=zeros)
    chex.assert_tree_all_finite(update(params))
    if entry.params == "pairs":  # a pair of zero factors is what a careless start gives
        chex.assert_tree_all_finite(update(zeros))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@those(lambda e: e.params == "pairs", RECIPES)
def test_the_zero_start_of_lora_is_left_whatever_keeps_divisions_safe(entry, dtype):
    """With one factor zero, for every eps and every damping, none included."""
    takes = inspect.signature(entry.factory).parameters
    sizes = jnp.array([0.0, 1e-30, 1e-8, 1.0])
    names = [name for name in ("eps", "damping") if name in takes]
    grid = dict(zip(names, jnp.meshgrid(*[sizes] * len(names)), strict=True))
    grid = jax.tree.map(jnp.ravel, grid) or {"learning_rate": jnp.full(1, 0.01)}
    x = problem(entry, dtype)[0]["pair"]
    start = {"pair": lrjax.LowRank(jnp.zeros_like(x.left), x.right)}
    train = jax.jit(jax.vmap(lambda point: run(entry.make(**point), start, steps=5)))
    (params, state), updates = train(grid)
    chex.assert_tree_all_finite((params, state, updates))
    moved = np.any(np.asarray(params["pair"].left, np.float32), axis=(-2, -1))
    assert np.all(moved) or entry.factory is lrjax.subgm  # which moves by its own length


@those(lambda e: e.transposes and e.params == "pairs")
def test_swapping_the_factors_transposes_the_step(entry):
    params, value, grads = problem(entry)
    pick = lambda tree: {"pair": tree["pair"]}
    flip = lambda tree: {"pair": tree["pair"].T}
    tx = entry.make()

    def one(p, g):
        return tx.update(g, tx.init(p), p, value=value, grad=g)[0]

    straight, flipped = one(pick(params), pick(grads)), one(flip(params), flip(grads))
    assert_close(flip(straight), flipped, condition=1e3)


@those(lambda e: e.gauge != "none")
def test_the_step_of_the_product_ignores_how_it_is_factored(entry, x64):
    params, _, _ = problem(entry, jnp.float64)
    x = params["pair"]
    q = jr.normal(jr.key(3), (2, 2), jnp.float64)
    q = jnp.linalg.qr(q)[0] if entry.gauge == "orthogonal" else q + 2 * jnp.eye(2)
    y = lrjax.LowRank(x.left @ q, x.right @ jnp.linalg.inv(q).T)
    tx = entry.make()

    @jax.jit
    def step_of_product(x):
        value, grad = value_and_grad({"w": x})
        params = {"w": x}
        updates, _ = tx.update(grad, tx.init(params), params, value=value, grad=grad)
        return optax.apply_updates(params, updates)["w"].materialize()

    assert_close(step_of_product(y), step_of_product(x), condition=1e6)


@those(lambda e: e.params == "pairs", RECIPES)
def test_training_ignores_the_split_into_factors_as_far_as_it_claims(entry, x64, getkey):
    """Twenty steps of one product that starts in three splits, towards one nearby."""
    x, off = (random_low_rank(getkey(), 8, 5, 2, dtype=jnp.float64) for _ in "xo")
    truth = lrjax.LowRank(x.left + off.left / 2, x.right + off.right / 2).materialize()
    # Far from a swap of the columns, which the norms of columns do not see.
    angle = jr.uniform(getkey(), minval=0.5, maxval=1.0)
    c, s = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[c, -s], [s, c]])
    splits = jnp.stack([jnp.eye(2), turn, turn @ jnp.diag(jnp.array([2.0, 0.3])) @ turn])

    @jax.jit
    @jax.vmap
    def products(q):
        distance = lambda x: jnp.mean((x.materialize() - truth) ** 2)
        start, tx = lrjax.LowRank(x.left @ q, x.right @ jnp.linalg.inv(q).T), entry.make()

        def body(carry, _):
            x, state = carry
            value, grad = jax.value_and_grad(distance)(x)
            updates, state = tx.update(grad, state, x, value=value, grad=grad)
            x = optax.apply_updates(x, updates)
            return (x, state), x.materialize()

        return jax.lax.scan(body, (start, tx.init(start)), length=20)[1]

    same, turned, stretched = np.asarray(products(splits))
    apart = {"orthogonal": relative_error(turned, same)}
    apart["any"] = relative_error(stretched, same)
    for gauge, error in apart.items():
        claimed = entry.gauge in (gauge, "any")
        assert (error < 1e-9) if claimed else (error > 1e-6), (gauge, error)


@those(lambda e: e.descends)
def test_lowers_the_loss(entry):
    params, value, _ = problem(entry)
    (trained, _), _ = jax.jit(lambda p: run(entry.make(), p, steps=60))(params)
    assert loss(trained) < 0.7 * value


@those(lambda e: e.params == "pairs" and e.factory is not ENTRIES["on_pairs"].factory)
def test_errors_name_the_problem(entry):
    params, value, grads = problem(entry)
    tx = entry.make()
    if entry.factory not in (lrjax.scale_by_polyak, lrjax.scale_by_target_level):
        if not entry.descends:  # an optimizer takes any tree
            with pytest.raises(ValueError, match=r"no lrjax.LowRank node.*on_pairs"):
                tx.init({"w": jnp.ones((3, 3))})
        torn = {"pair": jax.tree.map(lambda x: x, grads["pair"])}
        object.__setattr__(torn["pair"], "right", optax.MaskedNode())
        whole = {"pair": params["pair"]}
        with pytest.raises(ValueError, match=r"pair.* has lost one of its factors"):
            tx.update(torn, tx.init(whole), whole, value=value, grad=torn)
    if entry.extra:
        with pytest.raises(ValueError, match=r"value=…"):
            tx.update(grads, tx.init(params), params)


MOVES_BOTH = {"prune_columns", "rebalance"}


@pytest.mark.parametrize("side", ["left", "right"])
@those(lambda e: e.params == "pairs" and e is not ENTRIES["on_pairs"])
def test_a_frozen_factor_is_read_or_refused_by_name(entry, side):
    params, frozen = split_factors(PARAMS["pairs"](KEY), side)
    tx = entry.make()

    def two_steps(params):
        state = tx.init(params)
        for _ in range(2):
            whole = lambda params: loss(eqx.combine(params, frozen))
            value, grads = jax.value_and_grad(whole)(params)
            extra = {"value": value, "grad": grads, "frozen": frozen}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params, state

    parts = {entry.factory.__name__, *entry.composed_of, *entry.arguments}
    if MOVES_BOTH & parts:
        with pytest.raises(ValueError, match=r"needs pairs of which both .*pair is frozen"):
            jax.eval_shape(two_steps, params)
        return
    moved, state = jax.eval_shape(two_steps, params)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    # No moment, basis or copy is as large as the frozen factor.
    shapes = {x.shape for x in jax.tree.leaves(frozen)}
    assert not any(x.shape in shapes for x in jax.tree.leaves(state))
