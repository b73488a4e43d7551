"""Blocks that share their matrices and change them by low rank at each depth."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import nn
from tests.helpers import all_finite, assert_close


WIDTH, DEPTH, LOOPS = 6, 6, 3


class Block(eqx.Module):
    """A norm, a linear layer, an activation."""

    norm: eqx.nn.LayerNorm
    linear: eqx.nn.Linear
    activation: object = eqx.field(default=jax.nn.tanh)

    def __init__(self, key):
        k1, k2 = jr.split(key)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.norm = eqx.tree_at(lambda n: n.weight, self.norm, jr.normal(k1, (WIDTH,)))
        self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=k2)
        self.activation = jax.nn.tanh

    def __call__(self, x, scale=1.0, *, key=None):
        noise = 0.0 if key is None else jr.normal(key, x.shape)
        return x + scale * self.activation(self.linear(self.norm(x))) + noise


def blocks(getkey):
    return [Block(key) for key in jr.split(getkey(), DEPTH)]


def matrices(blocks):
    return np.stack([np.asarray(b.linear.weight, np.float64) for b in blocks])


def by_hand(blocks, x, *args, keys=(None,) * DEPTH):
    for block, key in zip(blocks, keys, strict=True):
        x = eqx.filter_jit(block)(x, *args, key=key)
    return x


def shared(weights, start):
    """The shared matrices, from their definition."""
    by_loop = weights.reshape(LOOPS, -1, WIDTH, WIDTH)
    steps = {"lower": [0, 1], "stepwise": [0, 5]}
    return by_loop.mean(0) if start == "average" else weights[steps[start]]


@pytest.mark.slow_but("lower")
@pytest.mark.parametrize("start", ["average", "lower", "stepwise"])
def test_at_full_rank_it_is_the_model_it_was_made_of(start, getkey):
    originals, x = blocks(getkey), jr.normal(getkey(), (WIDTH,))
    model = nn.share_blocks(originals, loops=LOOPS, rank=WIDTH, start=start)
    assert_close(model.weights["linear"], shared(matrices(originals), start))
    got = jnp.stack([b.linear.weight for b in model.unrolled()])
    assert_close(got, matrices(originals))
    run = eqx.filter_jit(lambda model, x: model(x, 0.5))
    assert_close(run(model, x), by_hand(originals, x, 0.5), condition=10)


def test_at_rank_zero_the_matrices_go_round(getkey):
    originals = blocks(getkey)
    model = nn.share_blocks(originals, loops=LOOPS, rank=0, start="lower")
    plain = model.unrolled()
    for depth, (block, original) in enumerate(zip(plain, originals, strict=True)):
        np.testing.assert_array_equal(
            block.linear.weight, originals[depth % 2].linear.weight
        )
        rest = lambda b: (b.norm, b.linear.bias)
        assert eqx.tree_equal(rest(block), rest(original))
    assert not any(
        map(lrjax.is_low_rank, jax.tree.leaves(model, is_leaf=lrjax.is_low_rank))
    )
    x = jr.normal(getkey(), (WIDTH,))
    assert_close(eqx.filter_jit(model)(x), by_hand(plain, x), condition=10)


def test_changes_are_the_best_of_their_rank(getkey):
    originals = blocks(getkey)
    model = nn.share_blocks(originals, loops=LOOPS, rank=2)
    weights = matrices(originals)
    rest = weights - np.tile(shared(weights, "average"), (LOOPS, 1, 1))
    s = np.linalg.svd(rest, compute_uv=False)
    got = [np.asarray(b.linear.weight, np.float64) for b in model.unrolled()]
    errors = np.linalg.norm(np.stack(got) - weights, axis=(1, 2))
    np.testing.assert_allclose(errors, np.sqrt(np.sum(s[:, 2:] ** 2, axis=1)), rtol=1e-4)
    x = jr.normal(getkey(), (WIDTH,))
    want = by_hand(model.unrolled(), x)
    assert_close(eqx.filter_jit(model)(x), want, condition=10)


def test_each_block_has_a_key_of_its_own(getkey):
    originals, x, key = blocks(getkey), jr.normal(getkey(), (WIDTH,)), getkey()
    model = nn.share_blocks(originals, loops=LOOPS, rank=WIDTH)
    keys = jr.split(key, (LOOPS, DEPTH // LOOPS)).reshape(-1)
    got = eqx.filter_jit(lambda model, x: model(x, key=key))(model, x)
    assert_close(got, by_hand(originals, x, keys=keys), condition=10)


@pytest.mark.slow
def test_it_is_trained_vmapped_and_stored(getkey, tmp_path):
    """In bfloat16 and from a stack; a shared matrix gets the gradients of all its loops."""
    stack = eqx.filter_vmap(Block)(jr.split(getkey(), DEPTH))
    model = nn.share_blocks(stack, loops=LOOPS, rank=1)
    x = jr.normal(getkey(), (4, WIDTH))

    @eqx.filter_jit
    def gradient(model, x):
        return eqx.filter_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(model)

    grads = gradient(model, x)
    assert grads.own.linear.change.left.shape == (LOOPS, 2, WIDTH, 1)
    one_by_one = gradient_of_weights(model.unrolled(), x)
    want = one_by_one.reshape(LOOPS, 2, WIDTH, WIDTH).sum(0)
    assert_close(grads.weights["linear"], want, condition=100)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, model)
    y = eqx.filter_jit(jax.vmap(half))(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert all_finite(y)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    back = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", model)
    assert eqx.tree_equal(back, model)


@eqx.filter_jit
def gradient_of_weights(blocks, x):
    def loss(blocks):
        y = x
        for block in blocks:
            y = jax.vmap(block)(y)
        return jnp.mean(y**2)

    return jnp.stack([g.linear.weight for g in eqx.filter_grad(loss)(blocks)])


@pytest.mark.usefixtures("shapes_unchecked")
def test_what_is_refused(getkey):
    originals = blocks(getkey)
    with pytest.raises(ValueError, match="loops must divide the 6 blocks, got 4"):
        nn.share_blocks(originals, loops=4, rank=1)
    with pytest.raises(ValueError, match="start must be one of"):
        nn.share_blocks(originals, loops=3, rank=1, start="upper")
    with pytest.raises(ValueError, match="rank must be between"):
        nn.share_blocks(originals, loops=3, rank=7)
    with pytest.raises(ValueError, match=r"no eqx\.nn\.Linear of a stack"):
        nn.share_blocks(originals, loops=3, rank=1, where="norm.weight")
    with pytest.raises(ValueError, match="all of one structure"):
        nn.share_blocks([*originals, eqx.nn.Linear(2, 2, key=getkey())], loops=1, rank=1)
