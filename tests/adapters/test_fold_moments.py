"""What becomes of the optimizer's state at a fold, for any optimizer; rates after it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import OneAndStack, assert_same, moved, normal_like
from tests.contract.test_optax_moments import MOMENTS
from tests.helpers import assert_close, relative_error
from tests.reference import folds as reference


R = 2
MODEL = eqx.filter_jit(OneAndStack)(jr.key(0), 3)
ADAM = optax.adam(1e-2)
KIND = lrjax.LoRA(R)


def rule_of(path, site):
    """Factors, and a copy beside them."""
    return room.Full() if path == "one" else KIND


@eqx.filter_jit
def made(kind, key):
    return lrjax.adapt(MODEL, kind, where=["one", "stack"], key=key)


def trained(tx, kind, key, steps=3):
    """Adapters after some steps with random gradients, and their state."""
    params, frozen = lrjax.partition(made(kind, key))
    many = lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype)
    params, state = descended(tx, params, normal_like(jax.tree.map(many, params), key))
    return eqx.combine(params, frozen), state


@eqx.filter_jit
def descended(tx, params, gradients):
    tx = optax.with_extra_args_support(tx)

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params, value=jnp.ones(()))
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]


def carried(moments, adapters, state, key, kind=rule_of):
    """New adapters, and what the rule makes of the state for them."""
    new = made(kind, key)
    return new, follow(moments, state, adapters, new, key)


@eqx.filter_jit
def follow(moments, state, old, new, key):
    return moments(state, old, new, key=key)


@eqx.filter_jit
def folded(moments, adapters, state, key, kind=rule_of):
    """The same within a fold."""
    _, new, state = room.Restart(kind, moments)(MODEL, adapters, state, key=key)
    return new, state


def begun(tx, adapters):
    return jax.jit(tx.init)(lrjax.partition(adapters)[0])


def arrays_of(state, shape):
    return [np.asarray(x) for x in jax.tree.leaves(state) if jnp.shape(x) == shape]


LEFT, RIGHT, COPY = (3, 4, R), (3, 3, R), (6, 5)


@pytest.mark.slow_but("adabelief")
@pytest.mark.parametrize("name", MOMENTS)
def test_pruned_by_parameter_in_every_optimizer(name, getkey):
    make, rate, _ = MOMENTS[name]
    tx, adapters = make(rate), made(rule_of, getkey())
    # Numbers of its own everywhere, as after any steps, and counts.
    numbers, others = eqx.partition(begun(tx, adapters), eqx.is_inexact_array)
    is_count = lambda x: jnp.issubdtype(x.dtype, jnp.integer)
    others = jax.tree.map(lambda x: x + 3 if is_count(x) else x, others)
    state = eqx.combine(moved(numbers, getkey()), others)
    new, got = carried(room.PruneMoments(tx, 0.5), adapters, state, getkey())
    fresh = begun(tx, new)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for shape in (LEFT, RIGHT):
        rows = [arrays_of(x, shape) for x in (got, state, fresh)]
        kept = None
        for after, before, start in zip(*rows, strict=True):
            assert np.all((after == before) | (after == start))
            differs = before != start
            if kept is None and np.any(differs):
                kept = after == before
            elif np.all(differs):
                np.testing.assert_array_equal(after == before, kept)
        assert name == "schedule_free_adamw" or rows[0], "nothing was found"
        assert kept is None or 0 < np.mean(kept) < 1
    others = lambda x: [
        leaf
        for leaf in map(np.asarray, jax.tree.leaves(x))
        if leaf.shape not in (LEFT, RIGHT)
    ]
    assert_same(others(got), others(state))  # copies and counts go on


@pytest.mark.slow
def test_fractions_of_nothing_and_of_all(getkey):
    adapters, state = trained(ADAM, rule_of, getkey())
    _, kept = folded(room.KeepMoments(), adapters, state, getkey())
    assert_same(kept, state)
    prune = lambda fraction: room.PruneMoments(ADAM, jnp.float32(fraction))
    _, none = folded(prune(0.0), adapters, state, getkey())
    assert_same(none, state)
    _, all_gone = folded(prune(1.0), adapters, state, getkey())
    assert not any(
        np.any(x) for x in arrays_of(all_gone, LEFT) + arrays_of(all_gone, RIGHT)
    )
    assert_same(arrays_of(all_gone, COPY), arrays_of(state, COPY))
    assert int(all_gone[0].count) == 3


@pytest.mark.slow_but("0.8")
@pytest.mark.parametrize("fraction", [0.25, 0.8])
def test_by_magnitude_the_smallest_first_moments_go(fraction, getkey):
    adapters, state = trained(ADAM, KIND, getkey())
    rule = room.PruneMoments(ADAM, fraction, by="magnitude")
    _, got = carried(rule, adapters, state, getkey(), KIND)
    for after, before, second, squares in zip(
        *(jax.tree.leaves(x) for x in (got[0].mu, state[0].mu, got[0].nu, state[0].nu)),
        strict=True,
    ):
        sizes = np.abs(np.asarray(before)).ravel()
        gone = np.zeros(sizes.size, bool)
        gone[np.argsort(sizes)[: int(np.ceil(fraction * sizes.size))]] = True
        gone = gone.reshape(before.shape)
        assert_close(after, np.where(gone, 0, before))
        assert_close(second, np.where(gone, 0, squares))


SCHEDULE = optax.linear_schedule(1.0, 0.0, 10)
WRAPPED = {
    "a chain": optax.chain(optax.clip(1.0), optax.adam(SCHEDULE)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    "masked": optax.masked(optax.adam(SCHEDULE), lambda p: jax.tree.map(lambda _: True, p)),
    "by label": optax.multi_transform(
        {"both": optax.adam(SCHEDULE), "copy": optax.sgd(1.0)},
        lambda p: jax.tree.map(
            lambda own: "both" if lrjax.is_low_rank(own) else "copy",
            p,
            is_leaf=lrjax.is_low_rank,
        ),
    ),
    "in steps": optax.MultiSteps(optax.adam(SCHEDULE), 2).gradient_transformation(),
    "whitened": optax.chain(lrjax.scale_by_gram(1e-2), optax.adam(SCHEDULE)),
    "eight bits": lrjax.quantize_state(optax.adam(SCHEDULE), min_size=1),
}


@pytest.mark.slow_but("a chain", "masked")
@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "eight bits"])
def test_a_reset_is_a_new_state_but_for_the_schedule(name, getkey):
    tx = WRAPPED[name]
    adapters, state = trained(tx, rule_of, getkey(), 4)
    new, got = carried(room.ResetMoments(tx), adapters, state, getkey())
    want = begun(tx, new)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    moments = lambda x: [m for m in jax.tree.leaves(x) if jnp.ndim(m)]
    assert_same(moments(got), moments(want))
    assert any(np.any(m) for m in moments(state))
    # The next step is the first one of a new optimizer, at the rate of the fifth.
    params = lrjax.partition(new)[0]
    grads = normal_like(params, getkey())
    update = jax.jit(tx.update)

    def ends(state, updates):
        for _ in range(2 if name == "in steps" else 1):
            updates, state = update(grads, state, params)
        return updates

    size = lambda x: float(np.linalg.norm(np.concatenate(list(map(np.ravel, x)))))
    step = jax.tree.leaves(ends(got, grads).layers["stack"])
    first = jax.tree.leaves(ends(want, grads).layers["stack"])
    part = 0.8 if name == "in steps" else 0.6
    assert abs(size(step) / size(first) - part) < 1e-3


@pytest.mark.slow_but("a chain")
@pytest.mark.parametrize(
    "name", ["a chain", "injected", "by label", "in steps", "eight bits"]
)
def test_pruned_within_others(name, getkey):
    tx = WRAPPED[name]
    adapters, state = trained(tx, rule_of, getkey())
    _, got = carried(room.PruneMoments(tx, 1.0), adapters, state, getkey())
    assert any(np.any(x) for x in arrays_of(state, LEFT))
    new = begun(tx, adapters)
    assert_same(arrays_of(got, LEFT), arrays_of(new, LEFT))
    assert_same(arrays_of(got, COPY), arrays_of(state, COPY))


def with_factors(adapters, left, right):
    new = lrjax.LowRank(*(jnp.asarray(x) for x in (left, right)))
    return eqx.tree_at(lambda a: a.layers["stack"].pair, adapters, new)


def turned(adapters, key):
    """The same adapters in a frame of their own: ``(L M, R N)`` with random M and N."""
    pair = adapters["stack"].pair
    m, n = np.random.default_rng(np.asarray(jr.key_data(key))).normal(size=(2, 3, R, R))
    return with_factors(adapters, np.asarray(pair.left) @ m, np.asarray(pair.right) @ n)


@eqx.filter_jit
def wide(kind, key):
    """Adapters of the stack in float64."""
    adapters = lrjax.adapt(MODEL, kind, where=["stack"], key=key)
    return jax.tree.map(lambda y: y.astype(float), adapters)


@pytest.mark.slow_but("both")
@pytest.mark.parametrize("train", ["both", "left"])
def test_first_moments_are_those_that_the_new_frame_would_have_seen(train, getkey, x64):
    """All gradients in the old frame, against all of them in a new one of its span."""
    kind = lrjax.LoRA(R, 3.0, train=train)
    old = wide(kind, getkey())
    whole = moved(lrjax.partition(old)[0], getkey())
    old = eqx.combine(whole, lrjax.partition(old)[1])
    new, tx = turned(old, getkey()), optax.trace(0.9)
    gradients = normal_like(jax.ShapeDtypeStruct((5, 3, 4, 3), float), getkey(), 1.0)

    @jax.jit
    def seen(adapters):
        params, frozen = lrjax.partition(adapters)

        def of(gradient):
            loss = lambda p: jnp.sum(
                1.5 * eqx.combine(p, frozen)["stack"].pair.materialize() * gradient
            )
            return jax.grad(loss)(params)

        step = lambda state, gradient: (tx.update(of(gradient), state)[1], None)
        return jax.lax.scan(step, tx.init(params), gradients)[0]

    state = follow(room.RotateMoments(), seen(old), old, new, getkey())
    assert_close(state.trace, seen(new).trace, condition=1e4)


def test_second_moments_are_the_formula_and_exact_for_turned_axes(getkey, x64):
    params, frozen = lrjax.partition(wide(KIND, getkey()))
    own = moved(params, getkey())
    old, other = (eqx.combine(x, frozen) for x in (own, moved(params, getkey())))
    squares = jax.tree.map(lambda x: jnp.asarray(np.square(x) + 0.1), moved(own, getkey()))
    state = optax.ScaleByRmsState(squares)
    rotated = lambda new: follow(room.RotateMoments(), state, old, new, getkey())
    got = rotated(other).nu["stack"].pair
    was, now, v = old["stack"].pair, other["stack"].pair, squares["stack"].pair
    for layer in range(3):
        left = reference.turned_squares(v.left[layer], was.right[layer], now.right[layer])
        right = reference.turned_squares(v.right[layer], was.left[layer], now.left[layer])
        assert relative_error(got.left[layer], left) < 1e-9
        assert relative_error(got.right[layer], right) < 1e-9
    # Axes that change places and lengths: the squares are those of each.
    swap = lambda x: np.asarray(x)[..., ::-1] * np.array([2.0, -3.0])
    got = rotated(with_factors(old, swap(was.left), swap(was.right))).nu["stack"].pair
    want = jax.tree.map(lambda x: np.asarray(x)[..., ::-1] * np.array([4.0, 9.0]), v)
    assert_close(got, want, condition=1e4)


def test_directions_from_outside_get_the_variance_that_was_seen(getkey):
    """Gradients of equal variance everywhere: the formula has it right on average."""
    rows = np.random.default_rng(int(jr.randint(getkey(), (), 0, 1 << 30)))
    old, new = rows.normal(size=(2, 400, R))
    gradients = rows.normal(size=(4000, 400))
    seen = np.mean((gradients @ old) ** 2, axis=0, keepdims=True)
    want = np.mean((gradients @ new) ** 2, axis=0, keepdims=True)
    got = reference.turned_squares(seen, old, new)
    # A mean of 4,000 squares is within √(2/4000) of itself, times six.
    assert np.all(np.abs(got / want - 1) < 6 * np.sqrt(2 / 4000) * 2)


def test_from_a_zero_factor_and_to_one_all_is_finite(getkey):
    adapters, state = trained(ADAM, KIND, getkey())
    new, got = carried(room.RotateMoments(), adapters, state, getkey(), KIND)
    # B is zero: the gradient of A is zero, and always was in that frame.
    assert not np.any(got[0].mu["stack"].pair.right)
    assert not np.any(got[0].nu["stack"].pair.right)
    assert np.any(got[0].mu["stack"].pair.left)
    assert int(got[0].count) == 3
    _, again = carried(room.RotateMoments(), new, got, getkey(), KIND)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(again))


def test_copies_keep_their_moments_when_others_turn(getkey):
    adapters, state = trained(ADAM, rule_of, getkey())
    _, got = folded(room.RotateMoments(), adapters, state, getkey())
    assert_same(arrays_of(got, COPY), arrays_of(state, COPY))


def shapes_of(tx, kind):
    """Adapters and their state, of which only the shapes are known."""

    def both(key):
        adapters = made(kind, key)
        return adapters, tx.init(lrjax.partition(adapters)[0])

    return eqx.filter_eval_shape(both, jr.key(0))


def traced(moments, adapters, state, kind):
    return eqx.filter_eval_shape(folded, moments, adapters, state, jr.key(0), kind)


def test_refusals():
    with pytest.raises(ValueError, match=r"fraction from 0 to 1 of the entries, got 1\.5"):
        room.PruneMoments(ADAM, 1.5)
    with pytest.raises((ValueError, TypeError), match="size"):
        room.PruneMoments(ADAM, 0.5, by="size")
    for kind in (room.HiRA(R), room.AdaLoRA(R)):
        with pytest.raises(ValueError, match=r"'one' is a .* RotateMoments cannot carry"):
            traced(room.RotateMoments(), *shapes_of(ADAM, kind), kind)
    tied = lrjax.TiedLoRA(R)
    with pytest.raises(ValueError, match=r"pools \['TiedLoRA'\] are trained"):
        traced(room.RotateMoments(), *shapes_of(ADAM, tied), tied)
    for rule in (room.RotateMoments(), room.PruneMoments(ADAM)):
        with pytest.raises(ValueError, match=r"'one' was a Factors of .* and came back"):
            traced(rule, *shapes_of(ADAM, KIND), lrjax.LoRA(R + 1))


def test_moments_in_codes_are_refused(getkey):
    """Bytes have no size to go by, and two numbers in one no place of their own."""
    for bits, by, message in (
        (8, "magnitude", "whose size cannot be read"),
        (4, "random", "nothing of its shape to forget"),
    ):
        tx = lrjax.quantize_state(ADAM, min_size=1, bits=bits)
        with pytest.raises(ValueError, match=message):
            traced(room.PruneMoments(tx, by=by), *shapes_of(tx, KIND), KIND)
    plain = optax.sgd(1e-2)
    adapters, state = trained(plain, KIND, getkey())
    assert carried(room.PruneMoments(plain), adapters, state, getkey(), KIND)[1] == state


@pytest.mark.slow
def test_the_schedule_is_cosines_joined(getkey):
    peak, steps, k, first, again = 2.0, 200, 50, 20, 10
    envelope = optax.warmup_cosine_decay_schedule(0.0, peak, first, steps, 0.2)
    pieces, places = [envelope], []
    for start in range(k, steps, k):
        up = optax.linear_schedule(0.0, envelope(start + again), again)
        pieces += [up, lambda t, start=start: envelope(t + start + again)]
        places += [start, start + again]
    joined = optax.join_schedules(pieces, places)
    counts = np.arange(steps)
    over = lambda schedule: np.asarray(jax.jit(jax.vmap(schedule))(counts))
    relora = lambda again: room.relora_schedule(
        peak, steps, k, warmup=first, rewarmup=again
    )
    want, none = over(joined), over(envelope)
    assert_close(over(relora(again)), want)
    assert_close(over(relora(0)), none)
    swept = jax.vmap(lambda again: jax.vmap(room.rewarm(envelope, k, again))(counts))
    assert_close(jax.jit(swept)(np.array([0, again])), np.stack([none, want]))
    with pytest.raises(ValueError, match="no negative number of steps"):
        room.rewarm(envelope, 0, 0)
    with pytest.raises(ValueError, match="must not be more than k"):
        room.rewarm(envelope, 5, 6)
    with pytest.raises(ValueError, match="less than steps"):
        room.relora_schedule(1.0, 100, 10, warmup=100)
