"""How many steps does a teacher of condition 1000 take, in factors four times too wide?

A linear student in factors of width 16, left factor zero as LoRA starts, learns a matrix of
rank 4 from the outputs of 200 random inputs: the steps to a relative error of 1e-6, the
median of five seeds, for singular values that are equal and for such that fall to a
thousandth. Whitened recipes at one rate each, without damping; Adam at the best of four
rates for each condition.
"""

import jax


jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from _harness import bound, write_results  # noqa: E402

import lrjax  # noqa: E402


OUTPUTS, INPUTS, SAMPLES, RANK, WIDTH = 60, 40, 200, 4, 16
SEEDS, STEPS, GOAL, CONDITION = 5, 1500, 1e-6, 1000.0
WHITENED = {
    "scaled_gd": lambda: lrjax.scaled_gd(0.5),
    "scaled_gd, alternating": lambda: lrjax.scaled_gd(0.7, order="alternating"),
    "lora_pro": lambda: lrjax.lora_pro(0.7, momentum=0.0),
    "alt_lora": lambda: lrjax.alt_lora(0.7, b1=0.5),
}
# Its damping follows the loss, and is above the smallest singular values for a long time.
DAMPED = {"prec_gd": lambda: lrjax.prec_gd(0.3, damping=0.1)}
RATES = jnp.array([0.01, 0.03, 0.1, 0.3])


def falling_adam(rate):
    """Adam with a rate that falls, without which it does not settle."""
    return optax.adam(lambda count: rate * jnp.exp(-5.0 * count / STEPS))


def errors(make, key, condition):
    """The relative error of the student after each step."""
    of_left, of_right, of_inputs, of_start = jr.split(key, 4)
    left = jnp.linalg.qr(jr.normal(of_left, (OUTPUTS, RANK)))[0]
    right = jnp.linalg.qr(jr.normal(of_right, (INPUTS, RANK)))[0]
    teacher = (left * condition ** -jnp.linspace(0.0, 1.0, RANK)) @ right.T
    inputs = jr.normal(of_inputs, (INPUTS, SAMPLES)) / SAMPLES**0.5
    student = lrjax.LowRank(
        jnp.zeros((OUTPUTS, WIDTH)), jr.normal(of_start, (INPUTS, WIDTH)) / INPUTS**0.5
    )
    tx = optax.with_extra_args_support(make())

    def loss(x):
        return jnp.sum(((x.materialize() - teacher) @ inputs) ** 2) / 2

    def step(carry, _):
        x, state = carry
        value, grad = jax.value_and_grad(loss)(x)
        updates, state = tx.update(grad, state, x, value=value, grad=grad)
        x = optax.apply_updates(x, updates)
        error = jnp.linalg.norm(x.materialize() - teacher) / jnp.linalg.norm(teacher)
        return (x, state), error

    return jax.lax.scan(step, (student, tx.init(student)), length=STEPS)[1]


def median_steps(path):
    """Steps until the goal, the median of the seeds; infinity if it is not reached."""
    reached = np.asarray(path) < GOAL
    first = np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1.0, np.inf)
    return np.median(first, axis=-1)


def row(name, runs):
    """The steps at both conditions, and what is left at the end."""
    easy, hard = (float(np.min(median_steps(path))) for path in runs)
    last = float(np.min(np.median(np.asarray(runs[1])[..., -1], axis=-1)))
    shown = lambda steps: int(steps) if np.isfinite(steps) else f"more than {STEPS}"
    return hard / easy, {
        "optimizer": name,
        "steps at condition 1": shown(easy),
        "steps at condition 1000": shown(hard),
        "error at the end at 1000": last,
    }


def main():
    keys, conditions = jr.split(jr.key(0), SEEDS), (1.0, CONDITION)
    rows, bounds = [], []
    for name, make in {**WHITENED, **DAMPED}.items():
        path = jax.jit(
            jax.vmap(lambda key, k, make=make: errors(make, key, k), in_axes=(0, None))
        )
        ratio, found = row(name, [path(keys, k) for k in conditions])
        rows.append(found)
        if name in WHITENED:
            claim = f"{name}: steps at condition 1000 over those at 1"
            bounds.append(bound(claim, ratio, at_most=1.2))

    def of_adam(rate, key, k):
        return errors(lambda: falling_adam(rate), key, k)

    over_seeds = jax.vmap(of_adam, in_axes=(None, 0, None))
    path = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None)))
    rows.append(row("adam", [path(RATES, keys, k) for k in conditions])[1])
    write_results("ill_conditioned_students", rows, bounds)


if __name__ == "__main__":
    main()
