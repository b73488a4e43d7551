"""What the gradients of single examples have in common."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.metrics import gradient_coherence


M = 7


def loss(params, x, y):
    return (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


@pytest.mark.slow_but("1")
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_is_the_mean_of_all_inner_products(batch_size, getkey, x64):
    params = {"w": jr.normal(getkey(), (4, 3)), "v": jr.normal(getkey(), (3,))}
    x, y = jr.normal(getkey(), (M, 4)), jr.normal(getkey(), (M,))
    run = jax.jit(lambda *a: gradient_coherence(loss, *a, batch_size=batch_size))
    found = run(params, x, y)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, x, y)
    rows = {k: np.asarray(g).reshape(M, -1) for k, g in grads.items()}
    whole = np.concatenate(list(rows.values()), axis=1)
    gram = whole @ whole.T
    alpha = np.mean(gram) / np.mean(np.diag(gram))
    np.testing.assert_allclose(found.coherence, alpha, rtol=1e-12)
    np.testing.assert_allclose(found.helped, M * alpha, rtol=1e-12)
    apart = np.mean(gram[~np.eye(M, dtype=bool)]) / np.mean(np.diag(gram))
    np.testing.assert_allclose(found.between, apart, atol=1e-12)
    for name, g in rows.items():
        want = np.mean(g @ g.T) / np.mean(np.sum(g**2, axis=1))
        np.testing.assert_allclose(found.by_leaf[name], want, rtol=1e-12)


def test_of_zero_gradients_it_is_zero():
    found = gradient_coherence(lambda w, x: 0.0 * x @ w, jnp.ones(2), jnp.ones((3, 2)))
    assert [float(x) for x in jax.tree.leaves(found)] == [0.0] * 4


def test_one_example_agrees_with_itself():
    found = gradient_coherence(lambda w, x: x @ w, jnp.ones(2), jnp.ones((1, 2)))
    assert found.helped == 1
    assert found.between == 0


def test_refuses_different_numbers_of_examples():
    with pytest.raises(ValueError, match="gradient_coherence needs examples"):
        gradient_coherence(loss, {}, jnp.ones((3, 2)), jnp.ones(2))
