import jax
import jax.random as jr
import jaxtyping
import pytest


@pytest.fixture
def rollout():
    """Run a transform over stacked gradients; returns the updates and the last state."""

    def run(tx, grads, params=None, state=None):
        if params is None:
            params = jax.tree.map(lambda g: g[0], grads)

        @jax.jit
        def scan(state, grads):
            state = tx.init(params) if state is None else state

            def step(state, g):
                updates, state = tx.update(g, state, params)
                return state, updates

            return jax.lax.scan(step, state, grads)

        state, updates = scan(state, grads)
        return updates, state

    return run


@pytest.fixture
def noisy():
    """Gradients ``(steps, m, n)``: a fixed matrix and fresh noise around it."""

    def make(key, steps, m, n, noise=0.5, dtype=None):
        fixed, fresh = jr.split(key)
        mean = jr.normal(fixed, (1, m, n), dtype)
        return mean + noise * jr.normal(fresh, (steps, m, n), dtype)

    return make


@pytest.fixture
def without_type_checks():
    """As a user runs it: a wrong type reaches the error that the library itself raises."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
