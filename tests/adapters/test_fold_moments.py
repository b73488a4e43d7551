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
from tests.adapters.models import OneAndStack, moved
from tests.contract.test_optax_moments import MOMENTS
from tests.helpers import assert_close, relative_error
from tests.reference import folds as reference


R = 2
MODEL = OneAndStack(jr.key(0), 3)
KIND = lrjax.LoRA(R)


def rule_of(path, site):
    """Factors, and a copy beside them."""
    return room.Full() if path == "one" else KIND


@eqx.filter_jit
def trained(tx, kind, key, steps=3):
    """Adapters after some steps with random gradients, and their state."""
    adapters = lrjax.adapt(MODEL, kind, where=["one", "stack"], key=key)
    params, frozen = lrjax.partition(adapters)
    state = tx.init(params)
    for step in range(steps):
        own = jr.fold_in(key, step)
        grads = moved(jax.tree.map(jnp.zeros_like, params), own)
        tx = optax.with_extra_args_support(tx)
        updates, state = tx.update(grads, state, params, value=jnp.ones(()))
        params = optax.apply_updates(params, updates)
    return eqx.combine(params, frozen), state


@eqx.filter_jit
def carried(moments, adapters, state, key, kind=rule_of):
    _, new, state = room.Restart(kind, moments)(MODEL, adapters, state, key=key)
    return new, state


def arrays_of(state, shape):
    return [np.asarray(x) for x in jax.tree.leaves(state) if jnp.shape(x) == shape]


LEFT, RIGHT, COPY = (3, 4, R), (3, 3, R), (6, 5)


@pytest.mark.parametrize("name", MOMENTS)
def test_pruned_by_parameter_in_every_optimizer(name, getkey):
    make, rate, _ = MOMENTS[name]
    tx = make(rate)
    adapters, state = trained(tx, rule_of, getkey())
    half = room.PruneMoments(tx, 0.5)
    new, got = carried(half, adapters, state, getkey())
    fresh = tx.init(lrjax.partition(new)[0])
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for shape in (LEFT, RIGHT):
        rows = [arrays_of(x, shape) for x in (got, state, fresh)]
        kept = None
        for after, before, begun in zip(*rows, strict=True):
            assert np.all((after == before) | (after == begun))
            differs = before != begun
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
    assert eqx.tree_equal(others(got), others(state)), "copies and counts go on"


def test_fractions_of_nothing_and_of_all(getkey):
    tx = optax.adam(1e-2)
    adapters, state = trained(tx, rule_of, getkey())
    _, none = carried(room.PruneMoments(tx, 0.0), adapters, state, getkey())
    assert eqx.tree_equal(none, state)
    _, kept = carried(room.KeepMoments(), adapters, state, getkey())
    assert eqx.tree_equal(kept, state)
    _, all_gone = carried(room.PruneMoments(tx, 1.0), adapters, state, getkey())
    assert not any(
        np.any(x) for x in arrays_of(all_gone, LEFT) + arrays_of(all_gone, RIGHT)
    )
    assert eqx.tree_equal(arrays_of(all_gone, COPY), arrays_of(state, COPY))
    assert int(all_gone[0].count) == 3


@pytest.mark.parametrize("fraction", [0.25, 0.8])
def test_by_magnitude_the_smallest_first_moments_go(fraction, getkey):
    tx = optax.adam(1e-2)
    adapters, state = trained(tx, KIND, getkey())
    rule = room.PruneMoments(tx, fraction, by="magnitude")
    _, got = carried(rule, adapters, state, getkey(), KIND)
    for after, before, second, squares in zip(
        *(jax.tree.leaves(x) for x in (got[0].mu, state[0].mu, got[0].nu, state[0].nu)),
        strict=True,
    ):
        sizes = np.abs(np.asarray(before)).ravel()
        gone = np.zeros(sizes.size, bool)
        gone[np.argsort(sizes)[: int(np.ceil(fraction * sizes.size))]] = True
        gone = gone.reshape(before.shape)
        assert_close(after, jnp.where(gone, 0, before))
        assert_close(second, jnp.where(gone, 0, squares))


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


@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "eight bits"])
def test_a_reset_is_a_new_state_but_for_the_schedule(name, getkey):
    tx = WRAPPED[name]
    adapters, state = trained(tx, rule_of, getkey(), 4)
    new, got = carried(room.ResetMoments(tx), adapters, state, getkey())
    want = tx.init(lrjax.partition(new)[0])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    moments = lambda x: [m for m in jax.tree.leaves(x) if jnp.ndim(m)]
    assert eqx.tree_equal(moments(got), moments(want))
    assert any(np.any(m) for m in moments(state))
    # The next step is the first one of a new optimizer, at the rate of the fifth.
    params = lrjax.partition(new)[0]
    grads = moved(jax.tree.map(jnp.zeros_like, params), getkey())

    @jax.jit
    def ends(state, updates):
        for _ in range(2 if name == "in steps" else 1):
            updates, state = tx.update(grads, state, params)
        return updates

    size = lambda x: float(np.linalg.norm(np.concatenate(list(map(np.ravel, x)))))
    step = jax.tree.leaves(ends(got, grads).layers["stack"])
    first = jax.tree.leaves(ends(want, grads).layers["stack"])
    part = 0.8 if name == "in steps" else 0.6
    assert abs(size(step) / size(first) - part) < 1e-3


@pytest.mark.parametrize(
    "name", ["a chain", "injected", "by label", "in steps", "eight bits"]
)
def test_pruned_within_others(name, getkey):
    tx = WRAPPED[name]
    adapters, state = trained(tx, rule_of, getkey())
    _, got = carried(room.PruneMoments(tx, 1.0), adapters, state, getkey())
    assert any(np.any(x) for x in arrays_of(state, LEFT))
    new = tx.init(lrjax.partition(adapters)[0])
    assert eqx.tree_equal(arrays_of(got, LEFT), arrays_of(new, LEFT))
    assert eqx.tree_equal(arrays_of(got, COPY), arrays_of(state, COPY))


def turned(adapters, key, shape=None):
    """The same adapters in a frame of their own: ``(L M, R N)`` with random M and N."""
    pair = adapters["stack"].pair
    m, n = jr.normal(key, (2, *(shape or pair.left.shape[:-2]), R, R), pair.dtype)
    new = lrjax.LowRank(pair.left @ m, pair.right @ n)
    return eqx.tree_at(lambda a: a.layers["stack"].pair, adapters, new)


@pytest.mark.parametrize("train", ["both", "left"])
def test_first_moments_are_those_that_the_new_frame_would_have_seen(train, getkey, x64):
    """All gradients in the old frame, against all of them in a new one of its span."""
    wide = lambda x: jax.tree.map(lambda y: y.astype(float), x)
    kind = lrjax.LoRA(R, 3.0, train=train)
    old = wide(lrjax.adapt(MODEL, kind, where=["stack"], key=getkey()))
    whole = moved(lrjax.partition(old)[0], getkey())
    old = eqx.combine(whole, lrjax.partition(old)[1])
    new, tx = turned(old, getkey()), optax.trace(0.9)
    gradients = jr.normal(getkey(), (5, 3, 4, 3))

    @jax.jit
    def seen(adapters):
        params, frozen = lrjax.partition(adapters)

        def of(gradient):
            loss = lambda p: jnp.sum(
                1.5 * eqx.combine(p, frozen)["stack"].pair.materialize() * gradient
            )
            return jax.grad(loss)(params)

        state = tx.init(params)
        for gradient in gradients:
            state = tx.update(of(gradient), state)[1]
        return state

    state = room.RotateMoments()(seen(old), old, new, key=getkey())
    assert_close(state.trace, seen(new).trace, condition=1e4)


def test_second_moments_are_the_formula_and_exact_for_turned_axes(getkey, x64):
    wide = lambda x: jax.tree.map(lambda y: y.astype(float), x)
    old = wide(lrjax.adapt(MODEL, KIND, where=["stack"], key=getkey()))
    own = moved(lrjax.partition(old)[0], getkey())
    old = eqx.combine(own, lrjax.partition(old)[1])
    other = wide(lrjax.adapt(MODEL, KIND, where=["stack"], key=getkey()))
    other = eqx.combine(moved(lrjax.partition(other)[0], getkey()), lrjax.partition(old)[1])
    squares = jax.tree.map(lambda x: x**2 + 0.1, moved(own, getkey()))
    state = optax.ScaleByRmsState(squares)
    got = room.RotateMoments()(state, old, other, key=getkey()).nu["stack"].pair
    was, now, v = old["stack"].pair, other["stack"].pair, squares["stack"].pair
    for layer in range(3):
        left = reference.turned_squares(v.left[layer], was.right[layer], now.right[layer])
        right = reference.turned_squares(v.right[layer], was.left[layer], now.left[layer])
        assert relative_error(got.left[layer], left) < 1e-9
        assert relative_error(got.right[layer], right) < 1e-9
    # Axes that change places and lengths: the squares are those of each.
    swap = lambda x: x[..., ::-1] * jnp.array([2.0, -3.0])[None, None]
    new = eqx.tree_at(lambda a: a.layers["stack"].pair, old, jax.tree.map(swap, was))
    got = room.RotateMoments()(state, old, new, key=getkey()).nu["stack"].pair
    want = jax.tree.map(lambda x: x[..., ::-1] * jnp.array([4.0, 9.0])[None, None], v)
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
    tx = optax.adam(1e-2)
    adapters, state = trained(tx, KIND, getkey())
    new, got = carried(room.RotateMoments(), adapters, state, getkey(), KIND)
    # B is zero: the gradient of A is zero, and always was in that frame.
    assert not np.any(got[0].mu["stack"].pair.right)
    assert not np.any(got[0].nu["stack"].pair.right)
    assert np.any(got[0].mu["stack"].pair.left)
    assert int(got[0].count) == 3
    _, again = carried(room.RotateMoments(), new, got, getkey(), KIND)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(again))


def test_copies_keep_their_moments_when_others_turn(getkey):
    tx = optax.adam(1e-2)
    adapters, state = trained(tx, rule_of, getkey())
    _, got = carried(room.RotateMoments(), adapters, state, getkey())
    assert eqx.tree_equal(arrays_of(got, COPY), arrays_of(state, COPY))


def test_refusals(getkey):
    tx = optax.adam(1e-2)
    with pytest.raises(ValueError, match=r"fraction from 0 to 1 of the entries, got 1\.5"):
        room.PruneMoments(tx, 1.5)
    with pytest.raises((ValueError, TypeError), match="size"):
        room.PruneMoments(tx, 0.5, by="size")
    for kind in (room.HiRA(R), room.AdaLoRA(R)):
        adapters, state = trained(tx, kind, getkey())
        with pytest.raises(ValueError, match=r"'one' is a .* RotateMoments cannot carry"):
            carried(room.RotateMoments(), adapters, state, getkey(), kind)
    adapters, state = trained(tx, lrjax.TiedLoRA(R), getkey())
    with pytest.raises(ValueError, match=r"pools \['TiedLoRA'\] are trained"):
        carried(room.RotateMoments(), adapters, state, getkey(), lrjax.TiedLoRA(R))
    other = lrjax.LoRA(R + 1)
    adapters, state = trained(tx, KIND, getkey())
    for rule in (room.RotateMoments(), room.PruneMoments(tx)):
        with pytest.raises(ValueError, match=r"'one' was a Factors of .* and came back"):
            carried(rule, adapters, state, getkey(), other)


def test_moments_in_codes_are_refused(getkey):
    """Bytes have no size to go by, and two numbers in one no place of their own."""
    for bits, by, message in (
        (8, "magnitude", "whose size cannot be read"),
        (4, "random", "nothing of its shape to forget"),
    ):
        tx = lrjax.quantize_state(optax.adam(1e-2), min_size=1, bits=bits)
        adapters, state = trained(tx, KIND, getkey(), 0)
        with pytest.raises(ValueError, match=message):
            room.PruneMoments(tx, by=by)(state, adapters, adapters, key=getkey())
    plain = optax.sgd(1e-2)
    adapters, state = trained(plain, KIND, getkey())
    assert carried(room.PruneMoments(plain), adapters, state, getkey(), KIND)[1] == state


def test_the_schedule_is_cosines_joined(getkey):
    peak, steps, k, first, again = 2.0, 200, 50, 20, 10
    envelope = optax.warmup_cosine_decay_schedule(0.0, peak, first, steps, 0.2)
    pieces, places = [envelope], []
    for start in range(k, steps, k):
        up = optax.linear_schedule(0.0, envelope(start + again), again)
        pieces += [up, lambda t, start=start: envelope(t + start + again)]
        places += [start, start + again]
    joined = optax.join_schedules(pieces, places)
    got = room.relora_schedule(peak, steps, k, warmup=first, rewarmup=again)
    counts = jnp.arange(steps)
    assert_close(jax.vmap(got)(counts), jax.vmap(joined)(counts))
    assert_close(jax.jit(jax.vmap(got))(counts), jax.vmap(joined)(counts))
    none = jax.vmap(room.relora_schedule(peak, steps, k, warmup=first, rewarmup=0))
    assert_close(none(counts), jax.vmap(envelope)(counts))

    @jax.vmap
    def swept(again):
        return jax.vmap(room.rewarm(envelope, k, again))(counts)

    assert_close(swept(jnp.array([0, again])), jnp.stack([none(counts), joined_of(joined)]))
    with pytest.raises(ValueError, match="no negative number of steps"):
        room.rewarm(envelope, 0, 0)
    with pytest.raises(ValueError, match="must not be more than k"):
        room.rewarm(envelope, 5, 6)
    with pytest.raises(ValueError, match="less than steps"):
        room.relora_schedule(1.0, 100, 10, warmup=100)


def joined_of(joined):
    return jax.vmap(joined)(jnp.arange(200))
