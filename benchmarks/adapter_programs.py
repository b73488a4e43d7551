"""What do adapters cost before the first step, in tracing, compilation and memory?

On the shapes of MiniLM alone: nothing is computed.
"""

import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import bound, median_ratio, write_results

import lrjax
from lrjax._tour.encoder import MINILM, Encoder


RANK, BATCH, LENGTH, MEMBERS, LAYERS, REPEATS = 8, 16, 64, 32, 30, 3
KINDS = {"LoRA": lrjax.LoRA(RANK), "DoRA": lrjax.DoRA(RANK)}


def shapes(tree, count, at=0):
    """The shapes of a tree with another length, or a new one, of the first axis."""
    make = lambda x: jax.ShapeDtypeStruct((count, *x.shape[at:]), x.dtype)
    return jax.tree.map(make, tree)


def tokens():
    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return ids, ids, jax.ShapeDtypeStruct((BATCH, MINILM.width), jnp.float32)


def squared(model, ids, mask, target):
    return jnp.mean((model(ids, mask) - target) ** 2)


class Case:
    """A step of Adam on ``trained``, and the shapes of all that it takes."""

    def __init__(self, encoder, kind):
        arrays, self.static = eqx.partition(encoder, lambda x: hasattr(x, "dtype"))
        if kind is None:
            self.trained, self.frozen, self.base = arrays, None, None
        else:
            adapt = lambda model: lrjax.adapt(model, kind, key=jr.key(0))
            adapters = eqx.filter_eval_shape(adapt, encoder)
            self.trained, self.frozen = lrjax.partition(adapters)
            self.base = arrays
        self.tx = optax.adam(1e-3)
        self.state = jax.eval_shape(self.tx.init, self.trained)

    def step(self, trained, state, frozen, base, data):
        def loss(trained):
            if base is None:
                return squared(eqx.combine(trained, self.static), *data)
            model = eqx.combine(base, self.static)
            return squared(lrjax.bind(model, eqx.combine(trained, frozen)), *data)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = self.tx.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    def lowered(self, members=None):
        """The step of one, or of many that share base and batch, before XLA sees it."""
        step, mine = self.step, (self.trained, self.state)
        if members is not None:
            step = jax.vmap(step, (0, 0, None, None, None))
            mine = shapes(mine, members)
        new = lambda *args: step(*args)  # or the cache of traces answers
        new = jax.jit(new, donate_argnums=(0, 1))
        return new.lower(*mine, self.frozen, self.base, tokens())


def peak(compiled):
    """Bytes of arguments, results and temporaries; what is donated counts once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def timed(function, *args):
    """The result and seconds of a processor; others' work hardly counts."""
    start = time.process_time()
    result = function(*args)
    return result, time.process_time() - start


def bind_seconds(kind):
    """What tracing ``bind`` of 100 layers takes, beyond taking and giving all arrays."""
    model = [eqx.nn.Linear(64, 64, key=jr.key(0)) for _ in range(100)]
    model = eqx.filter_jit(lambda m: jax.tree.map(lambda x: x, m))(model)
    adapters = eqx.filter_jit(lrjax.adapt)(model, kind, key=jr.key(0))
    trace = lambda f: eqx.filter_eval_shape(lambda m, a: f(m, a), model, adapters)
    both = lambda model, adapters: (model, adapters)
    pairs = [(timed(trace, lrjax.bind), timed(trace, both)) for _ in range(REPEATS)]
    return statistics.median(ours[1] - theirs[1] for ours, theirs in pairs)


def main():
    jax.config.update("jax_enable_compilation_cache", False)  # compile, do not look up
    encoder = eqx.filter_eval_shape(Encoder, jr.key(0))
    blocks = shapes(eqx.filter(encoder.blocks, lambda x: hasattr(x, "dtype")), LAYERS, 1)
    deep = eqx.tree_at(lambda m: m.blocks, encoder, eqx.combine(blocks, encoder.blocks))
    cases = {name: Case(deep, kind) for name, kind in ({"base": None} | KINDS).items()}
    tracing, compiling = ({name: [] for name in cases} for _ in range(2))
    for _ in range(REPEATS):
        for name, case in cases.items():
            lowered, seconds = timed(case.lowered)
            tracing[name].append(seconds)
            compiling[name].append(timed(lowered.compile)[1])

    case = Case(encoder, KINDS["LoRA"])
    base = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(case.base))
    one, many = (peak(case.lowered(members).compile()) for members in (None, MEMBERS))
    own = MEMBERS * (one - base)

    rows = [
        {
            "kind": name,
            "step traced, processor s": statistics.median(tracing[name]),
            "step compiled, processor s": statistics.median(compiling[name]),
            "bind of 100 layers, processor ms": (
                1e3 * bind_seconds(KINDS[name]) if name in KINDS else None
            ),
        }
        for name in cases
    ]
    write_results(
        "adapter_programs",
        rows,
        [
            bound(
                f"seconds to compile {LAYERS} stacked layers, "
                f"a step with {name} over without",
                median_ratio(compiling, name, "base"),
                at_most=1.2,
            )
            for name in KINDS
        ]
        + [
            bound(
                f"memory of {MEMBERS} vmapped members beside the base, over theirs alone",
                (many - base) / own,
                at_most=1.2,
            ),
        ],
    )


if __name__ == "__main__":
    main()
