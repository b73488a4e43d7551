"""Small models with every kind of layer that adapters meet."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

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


class OneAndStack(eqx.Module):
    """A layer, and as many others as are asked for in a stack."""

    one: eqx.nn.Linear
    stack: eqx.nn.Linear

    def __init__(self, key, layers):
        ko, ks = jr.split(key)
        self.one = eqx.nn.Linear(5, 6, key=ko)
        layer = lambda key: eqx.nn.Linear(3, 4, key=key)
        self.stack = eqx.filter_vmap(layer)(jr.split(ks, layers))


def everything(path, layer):
    return True


# Compiled as a whole: eagerly every small draw would be a program of its own.
tower = eqx.filter_jit(lambda key: Tower(key))
block = eqx.filter_jit(lambda key, width=8: Block(key, width))
adapt = eqx.filter_jit(lrjax.adapt)
merge = eqx.filter_jit(lrjax.merge)


def normal_like(tree, key, scale=0.3):
    """Random numbers in the layout of a tree; of NumPy, so that they are no program."""
    leaves, treedef = jax.tree.flatten(tree)
    if isinstance(key, jax.core.Tracer):
        keys = jr.split(key, len(leaves))
        draws = [jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        return treedef.unflatten([scale * x for x in draws])
    with jax.ensure_compile_time_eval():
        rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    draws = [scale * rng.standard_normal(x.shape) for x in leaves]
    return treedef.unflatten(
        [jnp.asarray(d, x.dtype) for d, x in zip(draws, leaves, strict=True)]
    )


def randomized(adapters, key):
    """Adapters with both factors of every pair at random, so that they act."""
    params, frozen = lrjax.partition(adapters)
    return eqx.combine(normal_like(params, key), frozen)


def assert_same(got, want):
    """To the last bit, in one layout."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert np.array_equal(a, b) if hasattr(a, "dtype") else a == b


class Table(eqx.nn.Embedding):
    """The usual way to tie a head: a method that reads the weight."""

    def attend(self, x):
        return self.weight @ x


class Zoo(eqx.Module):
    """What breaks adapters that know Linear layers alone, in one small model."""

    table: Table
    query: jax.Array  # (in, heads, size), as Flax's DenseGeneral stores it
    experts: jax.Array  # (experts, out, in)
    cell: eqx.nn.GRUCell
    normed: eqx.nn.WeightNorm
    blocks: eqx.nn.Linear  # stacked for scan
    grouped: eqx.nn.Conv1d
    shared: eqx.nn.Shared

    def __init__(self, key):
        k = jr.split(key, 9)
        self.table = Table(7, 4, key=k[0])
        self.query = jr.normal(k[1], (4, 2, 2)) / 2
        self.experts = jr.normal(k[2], (2, 4, 4)) / 2
        self.cell = eqx.nn.GRUCell(4, 4, key=k[3])
        self.normed = eqx.nn.WeightNorm(eqx.nn.Linear(4, 4, key=k[4]))
        layer = lambda key: eqx.nn.Linear(4, 4, key=key)
        self.blocks = eqx.filter_vmap(layer)(jr.split(k[5], 3))
        self.grouped = eqx.nn.Conv1d(4, 4, 3, padding=1, groups=2, key=k[6])
        pair = (eqx.nn.Embedding(7, 4, key=k[7]), eqx.nn.Linear(4, 7, key=k[8]))
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, tokens, policy=None):
        embedding, head = self.shared()
        x = jax.vmap(lambda t: self.table(t) + embedding(t))(tokens)
        x = x + jnp.einsum("ti,ihs->ths", x, self.query).reshape(x.shape)
        x = x + jnp.einsum("eoi,ti->to", jnp.tanh(self.experts), x)
        x = jax.vmap(self.cell)(x, x)
        x = x + jax.vmap(self.normed)(x)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def block(x, layer):
            return jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None

        x, _ = jax.lax.scan(jax.checkpoint(block, policy=policy), x, arrays)
        x = x + self.grouped(x.T).T
        return jax.vmap(lambda v: self.table.attend(v) + head(v))(x)


def zoo_axes(path, array):
    """Which axes of the arrays of a Zoo make the matrix."""
    specs = {
        "query": lrjax.MatrixSpec(rows=(1, 2), cols=(0,)),
        "experts": lrjax.MatrixSpec(rows=(1,), cols=(2,)),
    }
    return specs.get(path)


def zoo_where(path, layer):
    """All matrices of a Zoo but that which is another's."""
    return getattr(layer, "ndim", 2) > 1 and path not in ("shared.pytree.1", "normed.g")


# Each (outputs, inputs, how many) that ``zoo_where`` picks.
ZOO_SITES = [
    (4, 7, 1),  # table
    (4, 4, 1),  # query
    (4, 4, 2),  # experts
    (12, 4, 1),  # cell.weight_ih
    (12, 4, 1),  # cell.weight_hh
    (4, 4, 1),  # normed.layer
    (4, 4, 3),  # blocks
    (4, 6, 1),  # grouped: two inputs a group, three taps
    (4, 7, 1),  # shared.pytree.0
]
ZOO_PATHS = [
    "table",
    "query",
    "experts",
    "cell.weight_ih",
    "cell.weight_hh",
    "normed.layer",
    "blocks",
    "grouped",
    "shared.pytree.0",
]
zoo = eqx.filter_jit(lambda key: Zoo(key))


def moved(params, key):
    """Trained numbers, each moved by a random amount."""
    if any(isinstance(x, jax.core.Tracer) for x in (key, *jax.tree.leaves(params))):
        return jax.tree.map(jnp.add, params, normal_like(params, key))
    add = lambda x, off: jnp.asarray(np.asarray(x) + np.asarray(off), x.dtype)
    return jax.tree.map(add, params, normal_like(params, key))
