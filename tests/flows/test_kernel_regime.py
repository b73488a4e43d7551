import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import LowRank, flows, gradient_flow, lowrank, metrics

from ..helpers import assert_close, random_low_rank


def network(params, inputs):
    return (jnp.tanh(inputs @ params["in"]) @ params["out"]).ravel()


LAZY = flows.lazy_loss(network)


def value(x, inputs):
    del inputs
    return x.materialize().ravel()


PRODUCT = flows.lazy_loss(value)


def test_the_lazy_limit_is_the_flow_of_the_kernel(getkey):
    """Kernel and parameters change by O(1/α), directions by O(1/α²): exponents measured."""
    params = {"in": jr.normal(getkey(), (3, 6)), "out": jr.normal(getkey(), (6, 1))}
    inputs, targets = jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (4,))
    kernel = metrics.tangent_kernel(network, params, inputs)
    # A time in which all that the kernel learns at all fast is learnt.
    t1 = 3 / jnp.mean(jnp.linalg.eigvalsh(kernel))
    limit = flows.kernel_flow(t1, kernel, targets)

    @jax.jit
    def distances(scale):
        end = gradient_flow(
            LAZY, params, params, inputs, targets, scale, t1=t1, rtol=1e-12, atol=1e-15
        ).params
        outputs = scale * (network(end, inputs) - network(params, inputs))
        change = metrics.kernel_change(network, end, params, inputs)
        return jnp.stack([jnp.linalg.norm(outputs - limit), *change])

    scales = jnp.array([1e3, 1e4])
    found = np.log10(np.stack([distances(s) for s in scales]))
    np.testing.assert_allclose(found[0] - found[1], [1, 1, 2, 1], atol=0.02)
    rich = distances(jnp.array(0.03))
    assert rich[1] > 0.1  # the kernel is another one
    assert np.all(10 ** found[0, 1] < 1e-2 * rich[1])


@pytest.mark.slow
def test_the_kernel_flow_is_that_of_a_linear_model(getkey):
    jacobian, targets = jr.normal(getkey(), (4, 6)), jr.normal(getkey(), (4,))
    outputs = lambda w, j: j @ w
    loss = flows.lazy_loss(outputs)
    start, times = jr.normal(getkey(), (6,)), jnp.array([0.0, 0.2, 3.0])
    flow = gradient_flow(
        loss, start, start, jacobian, targets, 1.0, t1=3.0, ts=times, rtol=1e-10
    ).params
    kernel = metrics.tangent_kernel(outputs, start, jacobian)
    exact = flows.kernel_flow(times, kernel, targets)
    assert_close((flow - start[None]) @ jacobian.T, exact, rtol=1e-7)


@pytest.mark.slow
def test_a_standard_lora_start_is_lazy_in_one_factor(getkey):
    """``left = 0``: the kernel is ``I ⊗ R Rᵀ``, and the flow a regression on R."""
    x = random_low_rank(getkey(), 4, 3, 2, dtype=jnp.float64)
    x = LowRank(jnp.zeros((4, 2)), x.right)
    target, t = jr.normal(getkey(), (4, 3)), jnp.array(0.7)
    kernel = metrics.tangent_kernel(value, x, None)
    values, vectors = np.linalg.eigh(x.right @ x.right.T)
    decay = vectors @ np.diag(np.exp(-values * t)) @ vectors.T
    exact = flows.kernel_flow(t, kernel, target.ravel())
    assert_close(exact.reshape(4, 3), target - target @ decay)
    scale = 1e5
    end = gradient_flow(
        PRODUCT, x, x, None, target.ravel(), scale, t1=t, rtol=1e-11, atol=1e-14
    ).params
    assert_close(scale * end.materialize().ravel(), exact, rtol=1e-4)


@pytest.mark.slow
def test_kernels_of_aligned_factors_are_known(aligned):
    """Eigenvalues ``b_i² + a_j²`` on ``u_i ⊗ v_j``, through the whole of training."""
    t = jnp.array(0.8)
    end = gradient_flow(
        flows.approximation_loss, aligned.start, aligned.target, t1=t, rtol=1e-11
    ).params
    b, a = flows.aligned_modes(t, aligned.left, aligned.right, aligned.sigma)

    def known(b, a):
        rows = (aligned.u * b[None] ** 2) @ aligned.u.T
        columns = (aligned.v * a[None] ** 2) @ aligned.v.T
        return jnp.kron(rows, jnp.eye(5)) + jnp.kron(jnp.eye(7), columns)

    before, after = known(aligned.left, aligned.right), known(b, a)
    change = metrics.kernel_change(value, end, aligned.start, None)
    want = jnp.linalg.norm(after - before) / jnp.linalg.norm(before)
    assert_close(change.kernel, want, rtol=1e-8)
    cosine = metrics.kernel_alignment(after, before)
    assert_close(change.misalignment, 1 - cosine, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("aligned_with_task", [False, True])
def test_starts_of_low_rank_are_rich_unless_aligned(aligned_with_task, getkey):
    """Of one norm: the kernel of factors of a higher rank turns less, on average."""
    n, ranks, draws = 6, (1, 3, 6), 24

    def turned(key, spread):
        ku, kv, ks = jr.split(key, 3)
        u, v = (jnp.linalg.qr(jr.normal(k, (n, n)))[0] for k in (ku, kv))
        target = 2 * jnp.outer(u[:, 0], v[:, 0])
        start = lowrank.balanced_init((n, n), 3 * spread, key=ks)
        if aligned_with_task:
            root = jnp.sqrt(3 * spread)[None]
            start = LowRank(u * root, v * root)
        end = gradient_flow(
            flows.approximation_loss, start, target, t1=20.0, rtol=1e-6
        ).params
        return metrics.kernel_change(value, end, start, None).misalignment

    spreads = jnp.stack([jnp.where(jnp.arange(n) < r, 1 / r, 0) for r in ranks])
    over = jax.jit(jax.vmap(jax.vmap(turned, (0, None)), (None, 0)))
    mean = jnp.mean(over(jr.split(getkey(), draws), spreads), axis=1)
    if aligned_with_task:
        assert mean[0] < 1e-6
        assert jnp.all(mean[1:] > 1e-2)
    else:
        assert jnp.all(jnp.diff(mean) < 0)
        assert mean[-1] < 0.8 * mean[0]
