"""Do adapters of adaptive rank find planted ranks, and do they fit better for it?

A student of six layers learns a teacher whose weights differ from its own by matrices of
ranks 8, 0, 4, 0, 1 and 5. All methods end at 18 ranks in all, three a layer on average, and
take as many steps; each has the learning rate of three, and SoRA the weight of six,
that is best on validation data. All runs of a method are one program.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _harness import bound, write_results

import lrjax
from lrjax import adapters as room
from lrjax.transforms import Sensitivity


PLANTED = jnp.array([8, 0, 4, 0, 1, 5])
WIDTH, LARGEST, LAYERS, BUDGET = 32, 8, 6, 18
STEPS, BATCH, SEEDS = 400, 32, 5
RATES = jnp.array([1e-2, 3e-2, 1e-1])
WEIGHTS = jnp.array([0.3, 0.7, 1.0, 1.2, 1.5, 2.0])  # of SoRA's L1 norm


class Tower(eqx.Module):
    """Residual layers with a tanh, stacked."""

    blocks: eqx.nn.Linear

    def __init__(self, key):
        layer = lambda key: eqx.nn.Linear(WIDTH, WIDTH, key=key)
        self.blocks = eqx.filter_vmap(layer)(jr.split(key, LAYERS))

    def __call__(self, x):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(x, layer):
            return x + jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None

        return jax.lax.scan(step, x, arrays)[0]


def teacher(model, key):
    """The model plus matrices of the planted ranks, with singular values one."""
    noise = jr.normal(key, (2, LAYERS, WIDTH, LARGEST))
    left, right = jnp.linalg.qr(noise)[0]
    kept = jnp.arange(LARGEST)[None, :] < PLANTED[:, None]
    change = jnp.einsum("lor,lr,lir->loi", left, kept.astype(float), right)
    weight = model.blocks.weight + change
    return eqx.tree_at(lambda m: m.blocks.weight, model, weight)


def error(model, truth, x):
    """Mean squared error over that of the outputs' size."""
    want = truth(x)
    return jnp.sum((model(x) - want) ** 2) / jnp.sum(want**2)


class Task(eqx.Module):
    """A student, its teacher, and a key from which batches are drawn."""

    model: Tower
    truth: Tower
    key: jax.Array

    def __init__(self, key):
        model_key, teacher_key, self.key = jr.split(key, 3)
        self.model = Tower(model_key)
        self.truth = teacher(self.model, teacher_key)

    def batch(self, step, size=BATCH):
        return jr.normal(jr.fold_in(self.key, step), (size, WIDTH))

    def loss(self, adapters, x):
        return error(lrjax.bind(self.model, adapters), self.truth, x)

    def errors(self, adapters):
        """On validation data and on test data."""
        held = [self.batch(STEPS + i, 1024) for i in (1, 2)]
        return jnp.stack([self.loss(adapters, x) for x in held])


def fit(task, adapters, optimizer, rate, *, steps=STEPS, first=0, state=None, penalty=None):
    """Adapters and the state of the optimizer after some steps of all."""
    params, frozen = lrjax.partition(adapters)
    tx = optimizer(optax.adam(optax.cosine_decay_schedule(rate, STEPS)))
    state = tx.init(params) if state is None else state

    def loss(params, x):
        value = task.loss(eqx.combine(params, frozen), x)
        return value if penalty is None else value + penalty(params)

    def step(carry, count):
        params, state = carry
        gradient = jax.grad(loss)(params, task.batch(count))
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    counts = first + jnp.arange(steps)
    (params, state), _ = jax.lax.scan(step, (params, state), counts)
    return eqx.combine(params, frozen), state


plain = lambda adam: adam
FIXED = room.NLS((LARGEST, 3))  # its scale does not follow the rank


def adapted(task, kind, ranks=None):
    adapters = lrjax.adapt(task.model, kind, key=jr.fold_in(task.key, 9))
    return adapters if ranks is None else room.with_ranks(adapters, ranks)


def uniform(task, rate, _):
    return fit(task, adapted(task, lrjax.LoRA(3)), plain, rate)


def planted(task, rate, _):
    return fit(task, adapted(task, FIXED, PLANTED), plain, rate)


def cut(task, rate, _):
    """LoRA of the largest rank, then the 18 largest singular values of all layers."""
    adapters, state = fit(task, adapted(task, FIXED), plain, rate)
    u, values, v = jnp.linalg.svd(adapters["blocks"].pair.materialize())
    kept = (values >= jnp.sort(values.ravel())[-BUDGET])[:, :LARGEST]
    left = u[..., :LARGEST] * values[:, None, :LARGEST]
    pair = lrjax.LowRank(left, v.mT[..., :LARGEST])
    where = lambda a: (a.layers["blocks"].pair, a.layers["blocks"].mask)
    return eqx.tree_at(where, adapters, (pair, kept.astype(jnp.float32))), state


def adalora(task, rate, _):
    rule = {"begin": STEPS // 10, "end": 7 * STEPS // 10}
    optimizer = lambda adam: room.prune_ranks(adam, BUDGET, **rule)
    penalty = lambda params: 0.1 * room.orthogonality(params)
    start = adapted(task, room.AdaLoRA(LARGEST))
    return fit(task, start, optimizer, rate, penalty=penalty)


def adalora_without_penalty(task, rate, _):
    rule = {"begin": STEPS // 10, "end": 7 * STEPS // 10}
    optimizer = lambda adam: room.prune_ranks(adam, BUDGET, **rule)
    return fit(task, adapted(task, room.AdaLoRA(LARGEST)), optimizer, rate)


def sora(task, rate, weight):
    """The threshold is the learning rate times the weight of the L1 norm."""
    schedule = optax.cosine_decay_schedule(rate, STEPS)
    prox = optax.masked(lrjax.shrink(lambda count: weight * schedule(count)), room.gates)
    optimizer = lambda adam: optax.chain(adam, prox)
    return fit(task, adapted(task, room.SoRA(LARGEST)), optimizer, rate)


def in_turns(task, adapters, rate, turns, change, carry):
    """Training that stops after each turn for ``change`` of ranks; one program for all."""
    steps = STEPS // turns
    state = optax.adam(lambda count: rate).init(lrjax.partition(adapters)[0])

    def one(held, turn):
        adapters, state, carry = held
        part = {"steps": steps, "first": turn * steps, "state": state}
        adapters, state = fit(task, adapters, plain, rate, **part)
        adapters, carry = change(adapters, carry, turn)
        return (adapters, state, carry), None

    held, _ = jax.lax.scan(one, (adapters, state, carry), jnp.arange(turns))
    return held[:2]


def alora(task, rate, _):
    """Eight rounds, in each of which a ninth of the ranks moves."""
    validation = task.batch(STEPS, 32)
    score = lambda adapters: -task.loss(adapters, validation)

    def change(adapters, carry, turn):
        scores = room.ablation_scores(score, adapters)
        amount = jnp.where(turn < 8, BUDGET // 9, 0)
        return room.move_ranks(adapters, scores, amount), carry

    return in_turns(task, adapted(task, FIXED, 3), rate, 10, change, ())


def increlora(task, rate, _):
    """From one rank a layer, two layers at a time, in the first four tenths."""

    def change(adapters, tracked, turn):
        merged = lrjax.merge(task.model, adapters)
        gradient = eqx.filter_grad(error)(merged, task.truth, task.batch(turn))
        sample = room.change_sensitivity(task.model, adapters, gradient)
        tracked = tracked.updated(sample, 0.85, 0.85)
        more = room.grow_ranks(adapters, tracked.scores(), BUDGET, matrices=2)
        due = (turn >= 4) & (turn % 2 == 0)
        grows = lambda new, old: jnp.where(due, new, old)
        return jax.tree.map(grows, more, adapters), tracked

    tracked = Sensitivity.zeros({"blocks": jnp.zeros(LAYERS)})
    return in_turns(task, adapted(task, room.IncreLoRA(LARGEST)), rate, 40, change, tracked)


METHODS = {
    "LoRA, the planted ranks": planted,
    "LoRA, rank 3 everywhere": uniform,
    "LoRA, rank 8, cut to 18": cut,
    "AdaLoRA": adalora,
    "AdaLoRA, no penalty": adalora_without_penalty,
    "SoRA": sora,
    "ALoRA": alora,
    "IncreLoRA": increlora,
}


def results(method, weights):
    """Errors (weights, rates, seeds, 2) and ranks (…, layers)."""

    def member(weight, rate, key):
        task = Task(key)
        adapters, _ = method(task, rate, weight)
        return task.errors(adapters), room.active_ranks(adapters)["blocks"]

    over = jax.vmap(member, (None, None, 0))
    over = jax.vmap(jax.vmap(over, (None, 0, None)), (0, None, None))
    keys = jr.split(jr.key(0), SEEDS)
    return jax.tree.map(np.asarray, jax.jit(over)(weights, RATES, keys))


def state_bytes(method):
    """Of the adapters that are trained, and of the state of the optimizer."""

    def arrays():
        adapters, state = method(Task(jr.key(0)), 1e-3, 1e-3)
        return lrjax.partition(adapters)[0], state

    return [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t))
        for t in jax.eval_shape(arrays)
    ]


def row_of(name, method):
    weights = WEIGHTS if method is sora else WEIGHTS[:1]
    errors, ranks = results(method, weights)
    totals = ranks.sum(axis=-1)
    # What is over the budget does not count; one choice for all seeds.
    fits = totals.mean(axis=-1) <= BUDGET
    validation = np.where(
        fits, np.nan_to_num(errors[..., 0], nan=np.inf).mean(axis=-1), np.inf
    )
    assert fits.any(), f"{name} keeps no budget"
    best = np.unravel_index(np.argmin(validation), validation.shape)
    test, found = errors[best][:, 1], ranks[best]
    misplaced = np.maximum(np.asarray(PLANTED) - found, 0).sum(axis=-1)
    trained, state = state_bytes(method)
    return {
        "method": name,
        "test error, %": float(100 * np.exp(np.log(test).mean())),
        "… of the worst seed": float(100 * test.max()),
        "ranks by layer": " ".join(f"{r:.1f}" for r in found.mean(axis=0)),
        "in all": float(found.sum(axis=-1).mean()),
        "planted ranks not found": float(misplaced.mean()),
        "rate": float(RATES[best[1]]),
        "trained, bytes": trained,
        "state, bytes": state,
    }, test


def main():
    rows, tests = [], {}
    for name, method in METHODS.items():
        row, tests[name] = row_of(name, method)
        rows.append(row)
        print(row, flush=True)
    missed = {row["method"]: row["planted ranks not found"] for row in rows}
    uniform = "LoRA, rank 3 everywhere"
    ratio = lambda name: float(np.exp(np.log(tests[name] / tests[uniform]).mean()))
    names = list(METHODS)[2:]  # all that find their ranks
    write_results(
        "adapter_ranks",
        rows,
        [
            bound(f"test error over LoRA's of rank 3, {name}", ratio(name), at_most=1.0)
            for name in names
        ]
        + [
            bound(
                f"planted ranks not found over LoRA's of rank 3, {name}",
                missed[name] / missed[uniform],
                at_most=0.5,
            )
            for name in names
        ],
    )


if __name__ == "__main__":
    main()
