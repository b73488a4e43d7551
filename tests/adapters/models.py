"""Small models with every kind of layer that adapters meet."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import lrjax


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key, width=8):
        ka, ku, kd = jr.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, width, key=ka)
        self.up = eqx.nn.Linear(width, 2 * width, key=ku)
        self.down = eqx.nn.Linear(2 * width, width, key=kd)

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        return x + jax.vmap(lambda v: self.down(jax.nn.gelu(self.up(v))))(x)


class Tower(eqx.Module):
    """Token embedding, stacked blocks run by ``lax.scan``, a head."""

    embedding: eqx.nn.Embedding
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, key, width=8, depth=3, vocab=11):
        ke, kb, kh = jr.split(key, 3)
        self.embedding = eqx.nn.Embedding(vocab, width, key=ke)
        self.blocks = eqx.filter_vmap(lambda k: Block(k, width))(jr.split(kb, depth))
        self.head = eqx.nn.Linear(width, 3, key=kh)

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(x, block):
            return eqx.combine(block, static)(x), None

        x, _ = jax.lax.scan(step, jax.vmap(self.embedding)(tokens), arrays)
        return self.head(jnp.mean(x, axis=0))


def everything(path, layer):
    return True


# Compiled as a whole: eagerly every small draw would be a program of its own.
tower = eqx.filter_jit(lambda key: Tower(key))
block = eqx.filter_jit(lambda key, width=8: Block(key, width))
adapt = eqx.filter_jit(lrjax.adapt)


@eqx.filter_jit
def randomized(adapters, key):
    """Adapters with both factors of every pair at random, so that they act."""
    params, frozen = lrjax.partition(adapters)
    leaves, tree = jax.tree.flatten(params)
    keys = jr.split(key, len(leaves))
    new = [0.3 * jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return eqx.combine(jax.tree.unflatten(tree, new), frozen)
