"""On a gradient whose statistics never change no update may grow, however long."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from tests.helpers import random_low_rank
from tests.registry import RECIPES


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


SIGNAL = 0.3 * jr.normal(jr.key(7), (64, 64))  # in noise of size one
# Drawn once for all, and again and again: a draw takes longer than most updates.
NOISE = jr.normal(jr.key(0), (521, *SIGNAL.shape))
BASE = {name: entry for name, entry in RECIPES.items() if "(" not in name}


def sizes(entry, noise, steps=2126):
    """The root mean square of every update, at fixed parameters."""
    settings = {"learning_rate": 1.0}
    if "weight_decay" in entry.arguments:
        settings["weight_decay"] = 0.0
    tx = optax.with_extra_args_support(entry.factory(**settings))
    x = random_low_rank(jr.key(1), 64, 64, 4)
    params = {"w": x if entry.params == "pairs" else jnp.zeros_like(SIGNAL)}

    def step(state, t):
        g = SIGNAL + noise[t % len(noise)]
        if entry.params == "pairs":
            g = type(x)(g @ x.right, g.T @ x.left)
        updates, state = tx.update(
            {"w": g}, state, params, value=jnp.array(1.0), grad={"w": g}
        )
        squares = [jnp.mean(u**2) for u in jax.tree.leaves(updates)]
        return state, jnp.sqrt(sum(squares) / len(squares))

    return jax.lax.scan(step, tx.init(params), jnp.arange(steps))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", BASE)
def test_the_size_of_the_updates_is_steady(name):
    rms = jax.jit(lambda noise: sizes(BASE[name], noise))(NOISE)
    # Not one step, whose noise is no growth, but the mean of fifty, both times in the
    # middle of a period of 200 steps: a refresh that starts the moments anew is a peak.
    early, late = jnp.mean(rms[76:126]), jnp.mean(rms[2076:])
    assert late < 1.3 * early, f"{early:.3f} at 100 steps, {late:.3f} at 2000"
