"""A network that merges two adapters column by column."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax import merging
from tests.helpers import assert_close, random_low_rank, relative_error, tol


def two_changes(key, widths=(2, 3)):
    """Factors of two widths in a stack, dense matrices of as many rows, and vectors."""
    k = jr.split(key, 4)
    return [
        {
            "w": random_low_rank(k[2 * i], 6, 5, width, batch=(2,)),
            "x": jr.normal(k[2 * i + 1], (6, 4)),
            "b": jnp.full(3, float(i + 1)),
        }
        for i, width in enumerate(widths)
    ]


@eqx.filter_jit
def trained_network(changes, key):
    """Any numbers in its layers."""
    network = merging.ColumnNetwork(changes, hidden=7, key=key)
    leaves, structure = jax.tree.flatten(network)
    keys = jr.split(key, len(leaves))
    new = [x + jr.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return structure.unflatten(new)


def dense(x):
    x = x.materialize() if isinstance(x, lrjax.LowRank) else x
    return np.asarray(x, np.float64)


def by_the_paper(layers, deltas):
    """Column by column, of dense changes (m, n)."""
    first, v, last, u = (
        np.asarray(x, np.float64)
        for x in (layers.first, layers.first_bias, layers.last, layers.last_bias)
    )
    merged, coefficients = np.zeros_like(deltas[0]), []
    for j in range(merged.shape[1]):
        column = np.concatenate([delta[:, j] for delta in deltas])
        h = np.maximum(np.concatenate(list(first), axis=1) @ column + v, 0)
        c = last @ h + u
        merged[:, j] = sum(ck * delta[:, j] for ck, delta in zip(c, deltas, strict=True))
        coefficients.append(c)
    return merged, np.stack(coefficients, axis=1)


def test_columns_are_merged_as_the_paper_writes(getkey):
    changes = two_changes(getkey())
    network = trained_network(changes, getkey())
    merged, found = eqx.filter_jit(lambda n, c: (n(c), n.coefficients(c)))(network, changes)
    assert merged["w"].rank == 5  # factors stay factors, side by side
    assert np.array_equal(merged["b"], jnp.full(3, 3.0))
    layers, bound = network.layers["6"], tol(merged["x"], condition=100)
    want, c = by_the_paper(layers, [dense(tree["x"]) for tree in changes])
    assert relative_error(merged["x"], want) < bound
    assert relative_error(found["x"], c) < bound
    for i in range(2):
        want, c = by_the_paper(layers, [dense(tree["w"])[i] for tree in changes])
        assert relative_error(merged["w"].materialize()[i], want) < bound
        assert relative_error(found["w"][:, i], c) < bound


@pytest.mark.slow
def test_a_constant_network_is_a_weighted_sum_and_the_first_one_the_sum(getkey):
    changes = two_changes(getkey())
    network = merging.ColumnNetwork(
        changes, hidden=3, where=lambda path: path == "w", key=getkey()
    )
    assert_close(network(changes), merging.weighted_sum(changes, jnp.ones(2)))
    assert set(network.coefficients(changes)) == {"w"}
    weights = jnp.array([0.3, -2.0])
    constant = eqx.tree_at(lambda n: n.layers["6"].last_bias, network, weights)
    want = merging.weighted_sum(changes, weights)["w"].materialize()
    assert_close(constant(changes)["w"].materialize(), want, condition=10)


@pytest.mark.slow
def test_a_network_is_a_rule_for_adapters(getkey):
    model = eqx.nn.Linear(5, 6, key=getkey())
    own = [
        lrjax.adapters.Factors(
            random_low_rank(getkey(), 6, 5, r), None, scale, None, "both"
        )
        for r, scale in ((2, jnp.float32(-1.5)), (3, jnp.float32(1.0)))
    ]
    changes = [a.scale * a.pair.materialize() for a in own]
    network = trained_network(changes, getkey())
    trees = [lrjax.adapters.Adapters({"": a}) for a in own]
    weights = [1.0, 0.5]
    merged = lrjax.adapters.combine(trees, weights, model, rule=network)
    want = network(changes, weights)
    assert_close(merged[""].pair.materialize(), want, condition=100)


def test_no_dense_change_is_formed_of_factors(getkey):
    changes = [{"w": random_low_rank(getkey(), 60, 50, 2)} for _ in range(2)]
    network = merging.ColumnNetwork(changes, hidden=3, key=getkey())
    text = str(jax.make_jaxpr(lambda c: network(c))(changes))
    assert "60,50" not in text
    assert "50,60" not in text


@pytest.mark.slow
def test_training_gives_each_column_to_the_change_that_its_data_needs(getkey):
    """Data of two tasks that use other inputs: the loss goes to zero, the overlap too."""
    key, (m, n) = getkey(), (4, 8)
    own = jnp.concatenate([jnp.ones(n // 2), jnp.zeros(n // 2)])
    inputs = jnp.stack([jnp.diag(own), jnp.diag(1 - own)])
    changes = [random_low_rank(k, m, n, 2) for k in jr.split(key)]
    outputs = lambda k, change: change @ inputs[k]
    network = merging.ColumnNetwork(changes, hidden=32, key=getkey())
    tx = optax.adam(1e-2)

    @eqx.filter_jit
    def train(network):
        def step(carry, _):
            network, state = carry
            loss, grads = eqx.filter_value_and_grad(merging.column_loss)(
                network, changes, outputs
            )
            updates, state = tx.update(grads, state)
            return (eqx.apply_updates(network, updates), state), loss

        (network, _), losses = jax.lax.scan(step, (network, tx.init(network)), length=300)
        return losses, network.coefficients(changes)[""]

    losses, c = train(network)
    assert losses[-1] < 0.05 * losses[0]
    first = np.asarray(c[0] > c[1])
    assert np.array_equal(first, np.asarray(own > 0))


def test_what_does_not_fit_is_refused(getkey):
    changes = two_changes(getkey())
    network = merging.ColumnNetwork(changes, hidden=3, key=getkey())
    with pytest.raises(ValueError, match="merges 2 trees of changes, and was given 1"):
        network(changes[:1])
    other = [{"w": jnp.ones((3, 2)), "x": jnp.ones((6, 4)), "b": jnp.ones(3)}] * 2
    with pytest.raises(ValueError, match=r"layers for \['6'\] rows, and w has 3"):
        network(other)
    with pytest.raises(ValueError, match="found none"):
        merging.ColumnNetwork([jnp.ones(3)] * 2, key=getkey())
