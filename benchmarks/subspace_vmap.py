"""What does a vmapped sweep over eight learning rates cost?

Under ``vmap`` a refresh behind ``lax.cond`` on a counter of the state becomes a select, so
that every member runs its SVD on every step. lrjax un-maps the predicate (``galore``) or
has none (``subspace_adam``). The same sweep of eight members over ``optax.contrib.galore``
is timed beside them on matrices of several shapes, per step of all members, refreshes of
the first step aside.

What there is to win depends on the rank: the SVD costs the same at every rank, the two
products that every method of this kind needs cost in proportion to it. A hundred times,
which was asked for, is there at rank 16 and not at rank 64, where the products alone take
a hundredth of the SVDs. On small matrices passes over the moments count.

Then the jaxpr of the vmapped update is searched: a method whose refresh has a period must
not hold an SVD, QR or Cholesky outside a cond.
"""

import statistics

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import bound, interleaved, medians, timed, write_results

import lrjax


MEMBERS, PERIOD = 8, 200
SHAPES = ((128, 96, 16), (256, 512, 32), (512, 1376, 16), (512, 1376, 64))
BOUND_ON = SHAPES[-2:]
FACTORIZATIONS = ("svd", "qr", "geqrf", "householder_product", "cholesky", "eigh")
RATES = jnp.logspace(-4, -2, MEMBERS)


def optimizers(rank):
    def peer(rate):
        inner = optax.contrib.scale_by_galore(rank, PERIOD)
        return optax.chain(inner, optax.scale_by_learning_rate(rate))

    return {
        "optax galore": peer,
        "lrjax galore": lambda rate: lrjax.galore(rate, rank, refresh_every=PERIOD),
        "lrjax fira": lambda rate: lrjax.fira(rate, rank, refresh_every=PERIOD),
        "lrjax subspace_adam": lambda rate: lrjax.subspace_adam(rate, rank),
    }


def swept(make, grads):
    """The state of all members after two steps, and the compiled step of all of them."""
    init = jax.jit(jax.vmap(lambda rate, g: make(rate).init(g)))
    step = jax.vmap(lambda rate, g, state: make(rate).update(g, state))
    update = jax.jit(step, donate_argnums=2)
    state = init(RATES, grads)
    jaxpr = jax.make_jaxpr(step)(RATES, grads, state)
    box = [update(RATES, grads, state)[1]]

    def one():
        updates, box[0] = update(RATES, grads, box[0])
        return updates

    return one, jaxpr


def factorizations(jaxpr, inside=False):
    """Names of the decompositions of a jaxpr that are outside every cond."""
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in FACTORIZATIONS and not inside:
            found.append(name)
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    found += factorizations(sub, inside or name == "cond")
    return found


def main():
    rows, bounds = [], []
    for m, n, rank in SHAPES:
        grads = jr.normal(jr.key(0), (MEMBERS, m, n))
        steps, outside = {}, {}
        for name, make in optimizers(rank).items():
            steps[name], jaxpr = swept(make, grads)
            outside[name] = sorted(set(factorizations(jaxpr.jaxpr)))
        # The peer needs seconds for what the others do in milliseconds: fewer repeats.
        slow = [timed(steps["optax galore"]) for _ in range(5)]
        fast = {name: step for name, step in steps.items() if name != "optax galore"}
        seconds = {"optax galore": statistics.median(slow)}
        seconds |= medians(interleaved(fast, 20))
        for name, value in seconds.items():
            factor = seconds["optax galore"] / value
            row = {"shape": f"{m}x{n}", "rank": rank, "optimizer": name}
            row |= {"ms": 1e3 * value, "times faster": factor}
            rows.append(row | {"outside a cond": ", ".join(outside[name]) or "none"})
            if (m, n, rank) in BOUND_ON and name == "lrjax subspace_adam":
                claim = f"{m}x{n}, rank {rank}: {name} faster than optax galore"
                bounds.append(bound(claim, factor, at_least=100.0))
        for name in ("lrjax galore", "lrjax fira"):
            claim = f"{m}x{n}, rank {rank}: {name}, decompositions outside a cond"
            bounds.append(bound(claim, len(outside[name]), at_most=0))
    write_results("subspace_vmap", rows, bounds)


if __name__ == "__main__":
    main()
