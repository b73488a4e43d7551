"""Pairs of which one factor is frozen: it is read, never moved, and costs nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from tests.adapters.models import moved
from tests.helpers import assert_close, random_low_rank, split_factors


SIDES = "left", "right"


def steps(tx, params, frozen, of, count):
    """A few steps with gradients of the trained half alone, and the last updates."""

    def body(carry, _):
        params, state = carry
        whole = lambda params: of(eqx.combine(params, frozen))
        value, grads = jax.value_and_grad(whole)(params)
        extra = {"value": value, "grad": grads, "frozen": frozen}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(body, (params, tx.init(params)), length=count)


@pytest.fixture
def pair(getkey, x64):
    x = random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64)
    g = random_low_rank(getkey(), 9, 7, 3, dtype=jnp.float64)
    return g, x


def preconditioned(side, g, x, damping=0.0):
    """``G (partnerᵀ partner + λI)⁻¹`` of one side, by a dense inverse."""
    partner = np.asarray(x.right if side == "left" else x.left)
    gram = partner.T @ partner
    return getattr(g, side) @ np.linalg.inv(gram + damping * np.trace(gram) / 3 * np.eye(3))


ONE_SIDED = {
    "gram": (lrjax.scale_by_gram(0.1), 0.1),
    "phi": (
        lrjax.scale_by_gram(0.1, phi=lambda w: jax.tree.map(lambda f: 1.0 * f, w)),
        0.1,
    ),
    "tangent": (lrjax.scale_by_tangent(0.1), 0.1),
    "gauss_newton": (lrjax.scale_by_gauss_newton(0.1), 0.1),
    "alternating": (lrjax.scale_by_gram(0.1, order="alternating"), 0.1),
    "schedule": (lrjax.scale_by_gram(optax.constant_schedule(0.1)), 0.1),
    "loss": (lrjax.scale_by_gram(0.2, loss_power=1.0), 0.1),
}


@pytest.mark.slow_but("gram-left", "phi-right", "tangent-left")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("tx", "damping"), ONE_SIDED.values(), ids=ONE_SIDED.keys())
def test_the_trained_factor_is_preconditioned_by_the_frozen_one(tx, damping, side, pair):
    """Where the other one cannot move nothing is coupled, and no turn is waited for."""
    g, x = pair
    (g_half, _), (params, frozen) = split_factors(g, side), split_factors(x, side)
    state = tx.init(params)
    want = preconditioned(side, g, x, damping)
    for _ in range(2):
        step, state = tx.update(
            g_half, state, params, frozen=frozen, value=jnp.array(0.5), grad=g_half
        )
        assert jax.tree.structure(step) == jax.tree.structure(params)
        assert_close(getattr(step, side), want, condition=1e4)


@pytest.mark.parametrize("side", SIDES)
def test_the_unit_step_is_one_of_the_trained_factor(side, pair):
    g, x = pair
    (g_half, _), (params, frozen) = split_factors(g, side), split_factors(x, side)
    plain = preconditioned(side, g, x)
    want = plain / np.sqrt(np.sum(getattr(g, side) * plain))
    for tx in (
        lrjax.scale_by_gram(phi=lrjax.unit_norm),
        lrjax.scale_by_gauss_newton(normalize=True),
    ):
        step, _ = tx.update(g_half, tx.init(params), params, frozen=frozen)
        assert_close(getattr(step, side), want, condition=1e4)


def test_the_decay_of_the_product_reads_the_frozen_factor(pair):
    g, x = pair
    (g_half, _), (params, frozen) = split_factors(g, "left"), split_factors(x, "left")
    tx = lrjax.add_frobenius_decay(0.3)
    step, _ = tx.update(g_half, tx.init(params), params, frozen=frozen)
    assert_close(step.left, g.left + 0.3 * x.left @ (x.right.T @ x.right), condition=100)


def test_errors_say_what_is_missing(pair):
    g, x = pair
    (g_half, _), (params, frozen) = (
        split_factors({"w": g}, "left"),
        split_factors({"w": x}, "left"),
    )
    tx = lrjax.scale_by_gram()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"at w has lost one .* frozen=frozen"):
        tx.update(g_half, state, params)
    with pytest.raises(ValueError, match=r"at w has lost one .* None in the updates"):
        tx.update(g_half, state, {"w": x}, frozen=frozen)
    with pytest.raises(ValueError, match=r"frozen has to be the other half"):
        tx.update(g_half, state, params, frozen={"v": x})
    with pytest.raises(ValueError, match=r"rebalance needs pairs .* at w is frozen"):
        lrjax.transforms.rebalance().init(params)


def adapted(getkey, kind, width=12, depth=2):
    model = eqx.nn.MLP(width, width, width, depth - 1, key=getkey())
    adapters = lrjax.adapt(model, kind, key=getkey())
    return model, lrjax.partition(adapters)


def of_model(model, x, y):
    def value(adapters):
        return jnp.mean((jax.vmap(lrjax.bind(model, adapters))(x) - y) ** 2)

    return value


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_lora_with_one_trained_side_learns_under_every_wrapper(side, getkey):
    kind = lrjax.LoRA(4, train=side)
    model, (params, frozen) = adapted(getkey, kind)
    x = jr.normal(getkey(), (32, 12))
    # What another choice of the trained factors would give can be learned.
    teacher = eqx.combine(moved(params, getkey()), frozen)
    y = jax.vmap(lrjax.bind(model, teacher))(x)
    gram = lrjax.scale_by_gram(1e-2)
    label = lambda tree: jax.tree.map(lambda _: "all", tree, is_leaf=lrjax.is_low_rank)
    wrappers = {
        "plain": gram,
        "masked": optax.masked(gram, lambda tree: jax.tree.map(lambda _: True, tree)),
        "partition": optax.partition({"all": gram}, label),
        "every": lrjax.every(1, gram),
    }

    @jax.jit
    def run(params, frozen):
        of = of_model(model, x, y)
        ends = {}
        for name, tx in wrappers.items():
            tx = optax.chain(tx, optax.scale_by_learning_rate(2.0))
            (ends[name], _), _ = steps(tx, params, frozen, of, count=30)
        return ends, of(eqx.combine(params, frozen)), of(eqx.combine(ends["plain"], frozen))

    ends, before, after = run(params, frozen)
    assert after < 0.3 * before
    for end in ends.values():
        assert_close(end, ends["plain"], condition=100)


def compiled(tx, model, params, frozen, x, y):
    def step(params, state, frozen, x, y):
        whole = lambda params: of_model(model, x, y)(eqx.combine(params, frozen))
        grads = jax.grad(whole)(params)
        update = optax.with_extra_args_support(tx).update
        updates, state = update(grads, state, params, frozen=frozen)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    return jax.jit(step).lower(params, state, frozen, x, y).compile(), state


@pytest.mark.slow_but("decay and tangent")
@pytest.mark.parametrize(
    "direction",
    [
        optax.chain(lrjax.scale_by_gram(1e-3), optax.scale_by_adam()),
        optax.chain(lrjax.add_frobenius_decay(1e-3), lrjax.scale_by_tangent(1e-3)),
        lrjax.lora_muon(0.1),
    ],
    ids=["gram", "decay and tangent", "muon"],
)
def test_half_the_state_and_no_work_for_what_is_frozen(direction, getkey):
    """The gradient of the frozen factor, ``(m + n) r`` a row, and its optimizer are saved.

    So are the flops beyond those of a step in which the other side has no gradient at all:
    what is left of the optimizer is at most half of what both sides take.
    """
    x, y = jr.normal(getkey(), (2, 16, 12))
    flops, states = {}, {}
    for train in ("both", "left"):
        model, (params, frozen) = adapted(getkey, lrjax.LoRA(4, train=train))
        for name, tx in (("with", direction), ("without", optax.identity())):
            program, state = compiled(tx, model, params, frozen, x, y)
            flops[train, name] = program.cost_analysis()["flops"]
            states[train, name] = sum(
                a.nbytes for a in jax.tree.leaves(state) if a.ndim >= 2
            )
    assert flops["left", "without"] < flops["both", "without"]
    optimizer = {t: flops[t, "with"] - flops[t, "without"] for t in ("both", "left")}
    assert 0 < optimizer["left"] <= 0.55 * optimizer["both"]
    # Layers and factors are square: the frozen half is half of the numbers.
    assert 2 * states["left", "with"] == states["both", "with"]


def test_stacks_and_sweeps_of_half_pairs_are_loops(getkey):
    x = random_low_rank(getkey(), 6, 5, 2, batch=(3,))
    g = random_low_rank(getkey(), 6, 5, 2, batch=(3,))
    (g, _), (params, frozen) = split_factors(g, "right"), split_factors(x, "right")
    step = lambda damping: lrjax.scale_by_gram(damping).update(
        g, optax.EmptyState(), params, frozen=frozen
    )[0]
    dampings = jnp.array([0.0, 0.5])
    assert_close(jax.vmap(step)(dampings).right[1], step(0.5).right, condition=100)
    for k in range(3):
        one = lambda tree, k=k: jax.tree.map(lambda a: a[k], tree)
        tx = lrjax.scale_by_gram(0.5)
        alone, _ = tx.update(one(g), tx.init(one(params)), one(params), frozen=one(frozen))
        assert_close(one(step(0.5)), alone, condition=100)


@pytest.mark.slow
def test_on_a_zero_partner_everything_stays_finite(getkey):
    """LoRA with the trained side beside a frozen zero: no gradient, and no direction."""
    for dtype in (jnp.float32, jnp.bfloat16):
        x = lrjax.LowRank(jnp.zeros((6, 2), dtype), jr.normal(getkey(), (4, 2), dtype))
        params, frozen = split_factors(x, "right")
        g = jax.tree.map(jnp.ones_like, params)
        for tx, damping in ONE_SIDED.values():
            del damping
            step, _ = tx.update(
                g, tx.init(params), params, frozen=frozen, value=jnp.array(0.0), grad=g
            )
            assert np.isfinite(np.asarray(step.right, np.float32)).all()


KINDS = {
    "magnitude": lrjax.DoRA(2),
    "gate": lrjax.adapters.AdaLoRA(2),
    "core": lrjax.LoRAXS(2),
    "full": lrjax.adapters.Full(),
    "pool": lrjax.TiedLoRA(2),
    "nested": lrjax.adapters.NoRA(rank=2, outer=4),
    "half": lrjax.LoRA(2, train="left"),
}


@pytest.mark.slow_but("magnitude", "gate", "full")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_all_but_the_pairs_of_adapters_passes_unchanged(kind, getkey):
    """Magnitudes, gates, cores, whole weights, and the factors of a trained pool."""
    _, (params, frozen) = adapted(getkey, kind)
    grads = moved(params, getkey())
    params = moved(params, getkey())
    plain, factors = lrjax.scale_by_gram(1e-3), lrjax.is_low_rank
    if not any(factors(x) and jax.tree.leaves(x) for x in nodes_of(params)):
        tx = optax.masked(plain, lambda tree: jax.tree.map(factors, tree, is_leaf=factors))
    else:
        tx = plain
    update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p, frozen=frozen)[0])
    got = update(grads, params)
    others = 0
    for u, g, x in zip(*map(nodes_of, (got, grads, params)), strict=True):
        if not factors(u):
            np.testing.assert_array_equal(u, g)
            others += 1
        elif jax.tree.leaves(x):
            assert not np.allclose(jax.tree.leaves(u)[0], jax.tree.leaves(g)[0])
    assert (others > 0) == (not isinstance(kind, lrjax.LoRA | lrjax.adapters.NoRA))


def nodes_of(tree):
    return jax.tree.leaves(tree, is_leaf=lrjax.is_low_rank)
