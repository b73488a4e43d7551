"""Does projection onto the dominant subspace stall where the noise dominates?

The counter-example of GoLore (2024, arXiv 2410.11289), n = 10 and r = 4: ``f(X) = ½‖AX‖² +
⟨B, X⟩`` with ``A = [I 0]`` of n − r rows, ``B`` in the upper left block,
and a stochastic gradient with noise ``±σ diag(0, I)`` in the other r directions. Once the
noise is larger than the signal the leading singular vectors hold the noise alone. The norm
of the true gradient after training, for 8 draws of ``B`` and of the noise.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _harness import bound, write_results

import lrjax


SIZE, RANK, STEPS, SEEDS, NOISE, EVERY = 10, 4, 20_000, 8, 2.0, 20
RATE = optax.cosine_decay_schedule(5e-3, STEPS)
OPTIMIZERS = {
    "adam": lambda key: optax.adam(RATE),
    "galore": lambda key: lrjax.galore(RATE, RANK, refresh_every=EVERY, scale=1.0),
    "golore": lambda key: lrjax.golore(
        RATE, RANK, refresh_every=EVERY, switch_at=STEPS // 2, scale=1.0, key=key
    ),
    "fira": lambda key: lrjax.fira(RATE, RANK, refresh_every=EVERY, scale=1.0),
    "subspace_adam": lambda key: lrjax.subspace_adam(RATE, RANK, key=key),
}


def true_gradient(x, b):
    return jnp.where(jnp.arange(SIZE)[:, None] < SIZE - RANK, x, 0) + b


def run(make, key):
    """The norm of the true gradient at the start and along the way."""
    k_b, k_noise, k_basis = jr.split(key, 3)
    block = jnp.zeros((SIZE, SIZE)).at[: SIZE - RANK, : SIZE - RANK]
    b = block.set(jr.normal(k_b, (SIZE - RANK,) * 2))
    noise = NOISE * jnp.diag(1.0 * (jnp.arange(SIZE) >= SIZE - RANK))
    tx = make(k_basis)
    x = jnp.zeros((SIZE, SIZE))

    def step(carry, key):
        x, state = carry
        grad = true_gradient(x, b)
        noisy = grad + jnp.where(jr.bernoulli(key), noise, -noise)
        updates, state = tx.update(noisy, state, x)
        return (x + updates, state), jnp.linalg.norm(grad)

    _, norms = jax.lax.scan(step, (x, tx.init(x)), jr.split(k_noise, STEPS))
    return norms[:: STEPS // 20], norms[-1]


def main():
    rows, final = [], {}
    for name, make in OPTIMIZERS.items():
        one = jax.jit(jax.vmap(lambda key, make=make: run(make, key)))
        along, end = one(jr.split(jr.key(0), SEEDS))
        final[name] = end
        rows.append(
            {
                "optimizer": name,
                "start": float(jnp.mean(along[:, 0])),
                "median at the end": float(jnp.median(end)),
                "smallest": float(jnp.min(end)),
                "largest": float(jnp.max(end)),
            }
        )
    bounds = [
        bound("SVD basis: smallest gradient norm", final["galore"].min(), at_least=1.0),
        bound("subspace_adam: largest", final["subspace_adam"].max(), at_most=0.1),
    ]
    write_results("subspace_golore", rows, bounds)


if __name__ == "__main__":
    main()
