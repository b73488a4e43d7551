"""AutoLoRa: two branches, what trains which, adversarial inputs, and the schedule."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import adapters as of
from tests.helpers import all_finite, assert_close
from tests.reference.checkpoints import Reduced


HEAD = "layers.2"


def is_head(path):
    return path.startswith(HEAD)


@pytest.fixture
def setting(getkey):
    """A network whose hidden layers are adapted and moved, and a batch."""
    model = eqx.nn.MLP(6, 3, 8, 2, activation=jnp.tanh, key=getkey())
    adapters = lrjax.adapt(
        model,
        lrjax.LoRA(2, init="gaussian"),
        where=["layers.0", "layers.1"],
        key=getkey(),
    )
    move = lambda a: eqx.tree_at(
        lambda a: a.pair.left, a, 0.3 * jr.normal(getkey(), a.pair.left.shape)
    )
    adapters = of.map_adapters(lambda path, a: move(a), adapters)
    x, y = jr.uniform(getkey(), (16, 6)), jr.randint(getkey(), (16,), 0, 3)
    return model, adapters, x, y


def both_slopes(loss, model, adapters):
    """The gradients by the model and by the trained half of the adapters."""
    params, frozen = lrjax.partition(adapters)

    def of_both(trained):
        model, params = trained
        return loss(model, eqx.combine(params, frozen))

    return eqx.filter_jit(eqx.filter_grad(of_both))((model, params))


def moves(tree):
    return {
        path: bool(jnp.any(leaf != 0))
        for path, leaf in lrjax._matrices.named_leaves(tree)[0]
        if eqx.is_array(leaf)
    }


@pytest.mark.slow
def test_natural_examples_train_adapters_and_head_and_nothing_else(setting):
    model, adapters, x, y = setting

    def natural(model, adapters):
        branch = of.natural_branch(model, adapters, shared=is_head)
        logits = jax.vmap(branch)(x)
        return of.disentangled_loss(logits, logits, y, 1.0, 0.0)

    on_model, on_adapters = both_slopes(natural, model, adapters)
    assert moves(on_model) == {path: is_head(path) for path in moves(on_model)}
    assert all(moves(on_adapters).values())
    plain = jax.vmap(lrjax.bind(model, adapters))(x)
    branch = of.natural_branch(model, adapters, shared=is_head)
    assert_close(jax.vmap(branch)(x), plain)


def test_adversarial_examples_train_the_model_and_no_adapter(setting, getkey):
    model, adapters, x, y = setting
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def adversarial(model, adapters):
        hurts = lambda z: jnp.sum(entropy(jax.vmap(model)(z), y))
        z = of.adversarial_inputs(hurts, x, radius=0.1, step_size=0.05, key=jr.key(0))
        q = jax.vmap(model)(z)
        return of.disentangled_loss(jnp.zeros_like(q), q, y, 0.0, 0.0)

    on_model, on_adapters = both_slopes(adversarial, model, adapters)
    assert all(moves(on_model).values())
    assert not any(moves(on_adapters).values())


@pytest.mark.slow
def test_the_loss_is_its_formula_and_its_gradient_that_of_three_parts(getkey, x64):
    p, q = (3 * jr.normal(getkey(), (16, 3), jnp.float64) for _ in "pq")
    y = jr.randint(getkey(), (16,), 0, 3)
    both = jax.jit(jax.value_and_grad(of.disentangled_loss, (0, 1)))
    got, (by_p, by_q) = both(p, q, y, 0.3, 2.0)
    soft = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    a, b, rows = soft(np.asarray(p)), soft(np.asarray(q)), np.arange(16)
    want = -0.3 * np.log(a[rows, y]) - 0.7 * np.log(b[rows, y])
    want = want + 2.0 * np.sum(a * np.log(a / b), axis=-1)
    assert_close(got, want.mean(), condition=100)
    onehot = np.eye(3)[np.asarray(y)]
    # Of both sides: the divergence teaches the model, and keeps the teacher with it.
    assert_close(by_q, (0.7 * (b - onehot) + 2.0 * (b - a)) / 16, condition=100)
    log = np.log(a / b)
    pull = a * (log - np.sum(a * log, axis=-1, keepdims=True))
    assert_close(by_p, (0.3 * (a - onehot) + 2.0 * pull) / 16, condition=100)


@pytest.mark.parametrize(
    ("accuracy", "want"), [(0.0, (1, 0)), (1.0, (0, 6)), (0.5, (0.5, 3))]
)
def test_the_weights_follow_what_is_learned(accuracy, want):
    assert_close(of.disentangled_weights(accuracy), tuple(map(jnp.float32, want)))
    first, second = of.disentangled_weights(accuracy, scale=2.0)
    assert float(second) == 2 * accuracy
    assert float(first) == 1 - accuracy


def test_adversarial_inputs_of_a_linear_loss_are_the_worst_of_their_box(getkey):
    slope = jr.normal(getkey(), (5, 4))
    x = jr.uniform(getkey(), (5, 4))
    find = jax.jit(
        lambda key: of.adversarial_inputs(lambda z: jnp.sum(z * slope), x, key=key)
    )
    worst = jnp.clip(x + 8 / 255 * jnp.sign(slope), 0, 1)
    assert_close(find(getkey()), worst)
    wide = {"start": 0.0, "low": -1.0, "high": 2.0}
    few = of.adversarial_inputs(
        lambda z: jnp.sum(z * slope), x, steps=2, key=getkey(), **wide
    )
    assert_close(few, x + 4 / 255 * jnp.sign(slope), condition=10)


@pytest.mark.slow
def test_adversarial_inputs_stay_in_their_box_and_hurt(setting, getkey):
    model, _, x, y = setting
    entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = lambda z: jnp.sum(entropy(jax.vmap(model)(z), y))
    z = of.adversarial_inputs(loss, x, radius=0.2, step_size=0.05, key=getkey())
    assert loss(z) > loss(x)
    assert jnp.max(jnp.abs(z - x)) <= 0.2 + 1e-6
    assert jnp.all((z >= 0) & (z <= 1))


@pytest.mark.slow_but("checkpoints1")
@pytest.mark.parametrize("checkpoints", [(0, 2, 4, 5, 7, 10), (0, 1, 2, 3), (0, 6)])
def test_the_schedule_is_the_rule_as_it_is_written(checkpoints, getkey):
    """Scores that often repeat themselves, and steps between them without a score."""
    tx = lrjax.reduce_at_checkpoints(checkpoints, factor=0.5, progress=0.75)

    @jax.jit
    @jax.vmap
    def run(scores, steps):
        def step(carry, seen):
            x, state = carry
            score, u = seen
            for _ in range(2):
                u, state = tx.update(seen[1], state, x, score=score)
                x, score = x + u, jnp.nan
            return (x, state), (x, state.rate)

        start = jnp.zeros(3)
        return jax.lax.scan(step, (start, tx.init(start)), (scores, steps))[1]

    climbs = jr.randint(getkey(), (40, 12), -1, 2)
    scores = jnp.cumsum(climbs, axis=1) / 4 + 0.5
    steps = jr.normal(getkey(), (40, 12, 3))
    xs, rates = run(scores, steps)
    reductions = 0
    for member in range(40):
        rule, x = Reduced(checkpoints, 0.5, 0.75), np.zeros(3)
        for t in range(12):
            u = np.asarray(steps[member, t])
            back = rule.see(float(scores[member, t]), x)
            x = x + rule.rates[-1] * u if back is None else back
            x = x + rule.rates[-1] * u
            reductions += back is not None
            assert float(rates[member, t]) == rule.rates[-1], (member, t)
            np.testing.assert_allclose(xs[member, t], x, rtol=1e-4, atol=1e-5)
    assert 20 < reductions < 40 * len(checkpoints)


def test_without_scores_nothing_is_reduced_and_autolora_is_sgd(getkey):
    """With momentum and with L2 regularization in the gradient."""
    x = {"weight": jr.normal(getkey(), (9, 8)), "bias": jr.normal(getkey(), (3,))}
    grads = {"weight": jr.normal(getkey(), (9, 8)), "bias": jr.normal(getkey(), (3,))}
    tx, state = lrjax.autolora(), lrjax.autolora().init(x)
    momentum, here = jax.tree.map(np.zeros_like, x), x
    for _ in range(3):
        step, state = tx.update(grads, state, here)
        decayed = {
            "weight": np.asarray(grads["weight"] + 2e-4 * here["weight"]),
            "bias": np.asarray(grads["bias"]),
        }
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, decayed)
        assert_close(step, jax.tree.map(lambda m: -0.1 * m, momentum), rtol=1e-5)
        here = optax.apply_updates(here, step)


@pytest.mark.slow
def test_a_training_becomes_robust_in_two_branches(setting, getkey):
    """From a model that guesses: the worst inputs of a linear task are learned."""
    model, adapters, _, _ = setting
    truth = jr.normal(getkey(), (3, 6))
    x = jr.uniform(getkey(), (256, 6))
    margins = jnp.sort((x - 0.5) @ truth.T, axis=1)
    clear = margins[:, 2] - margins[:, 1] > 0.4  # further apart than an attack reaches
    y = jnp.argmax((x - 0.5) @ truth.T, axis=1)
    params, frozen = lrjax.partition(adapters)
    weights, static = eqx.partition(model, eqx.is_array)
    tx = lrjax.autolora(0.3, checkpoints=(0, 30, 60, 90), momentum=0.9)
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def attacked(weights, key):
        model = eqx.combine(weights, static)
        hurts = lambda z: jnp.sum(entropy(jax.vmap(model)(z), y))
        return of.adversarial_inputs(hurts, x, steps=4, radius=0.03, key=key)

    def accuracies(trained, key):
        weights, params = trained
        model = eqx.combine(weights, static)
        right = lambda model, z: jnp.argmax(jax.vmap(model)(z), axis=1) == y
        branch = lrjax.bind(model, eqx.combine(params, frozen))
        robust = right(model, attacked(weights, key)) & clear
        return jnp.mean(right(branch, x)), jnp.sum(robust) / jnp.sum(clear)

    def step(carry, key):
        trained, state = carry
        natural, robust = accuracies(trained, key)
        first, second = of.disentangled_weights(natural)
        z = attacked(trained[0], key)

        def loss(trained):
            weights, params = trained
            model = eqx.combine(weights, static)
            whole = eqx.combine(params, frozen)
            branch = of.natural_branch(model, whole, shared=is_head)
            return of.disentangled_loss(
                jax.vmap(branch)(x), jax.vmap(model)(z), y, first, second
            )

        updates, state = tx.update(jax.grad(loss)(trained), state, trained, score=robust)
        return (optax.apply_updates(trained, updates), state), (natural, robust)

    start = (weights, params)
    run = jax.jit(lambda keys: jax.lax.scan(step, (start, tx.init(start)), keys))
    (end, state), (natural, robust) = run(jr.split(getkey(), 100))
    assert all_finite(end)
    assert robust[-1] > 0.8
    assert natural[-1] > 0.8
    assert state[-1].best >= robust[-1]


@pytest.mark.parametrize("checkpoints", [(), (1, 2), (0, 3, 3)])
def test_checkpoints_begin_at_zero_and_grow(checkpoints):
    with pytest.raises(ValueError, match=r"needs checkpoints \(0, …\) that grow"):
        lrjax.reduce_at_checkpoints(checkpoints)


def test_a_score_needs_the_parameters():
    tx = lrjax.autolora(weight_decay=0.0)
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="needs the parameters that a score belongs to"):
        tx.update(x, tx.init(x), score=0.5)
