import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax.continual import RecursiveLeastSquares
from tests.reference.least_squares import covariance_recursion, ridge_regression


FEATURES, OUTPUTS = 12, 3
update = jax.jit(RecursiveLeastSquares.update)


def samples(key, count, steepness=2.0):
    """Features whose spectrum falls by ``10^steepness``, and noisy targets."""
    a, b, c, d = jr.split(key, 4)
    turn = jnp.linalg.qr(jr.normal(a, (FEATURES, FEATURES)))[0]
    x = jr.normal(b, (count, FEATURES)) * jnp.logspace(0, -steepness, FEATURES)[None] @ turn
    y = x @ jr.normal(c, (FEATURES, OUTPUTS)) + 0.1 * jr.normal(d, (count, OUTPUTS))
    return x, y


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.slow
def test_any_split_in_any_order_is_the_joint_ridge_regression(getkey, x64):
    x, y = samples(getkey(), 60)
    want = ridge_regression(x, y, 1e-3)
    order = jr.permutation(getkey(), 60)
    for sizes in ((60,), (20, 20, 20), (1, 39, 20), (39, 1, 20)):
        head = RecursiveLeastSquares.start(FEATURES, OUTPUTS, ridge=1e-3, dtype=x.dtype)
        for rows in np.split(order, np.cumsum(sizes)[:-1]):
            head = update(head, x[rows], y[rows])
        assert relative(head.weight(), want) < 1e-10


def test_it_is_the_recursion_on_the_inverse(getkey, x64):
    x, y = samples(getkey(), 40)
    batches = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 40, 8)]
    head = RecursiveLeastSquares.start(FEATURES, OUTPUTS, ridge=0.1, dtype=x.dtype)
    for k, (a, b) in enumerate(batches):
        head = update(head, a, b)
        want = covariance_recursion(batches[: k + 1], 0.1, np.float64)
        assert relative(head.weight(), want) < 1e-10


@pytest.mark.slow
def test_new_classes_appear(getkey, x64):
    """As if all samples before had had zeros for them."""
    x, _ = samples(getkey(), 50)
    labels = jnp.concatenate(
        [jr.randint(getkey(), (30,), 0, 2), jr.randint(getkey(), (20,), 0, 5)]
    )
    head = RecursiveLeastSquares.start(FEATURES, 2, dtype=x.dtype)
    head = update(head, x[:30], jax.nn.one_hot(labels[:30], 2))
    head = update(head.with_outputs(5), x[30:], jax.nn.one_hot(labels[30:], 5))
    want = ridge_regression(x, jax.nn.one_hot(labels, 5), 1.0)
    assert relative(head.weight(), want) < 1e-10


@pytest.mark.slow
def test_float32_loses_the_digits_of_the_samples_not_of_their_squares(getkey):
    x, y = samples(getkey(), 400, steepness=3.0)
    batches = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 400, 8)]
    ridge = 1e-6
    want = ridge_regression(x, y, ridge)
    start = RecursiveLeastSquares.start(FEATURES, OUTPUTS, ridge=ridge)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    head, _ = jax.jit(
        lambda head, both: jax.lax.scan(lambda h, b: (h.update(*b), None), head, both)
    )(start, stacked)
    condition = np.linalg.cond(np.asarray(x, np.float64))
    error = relative(head.weight(), want)
    # A backward error of a few roundings a batch, at random signs, times the condition.
    assert error < 8 * np.sqrt(len(batches)) * jnp.finfo(x.dtype).eps * condition
    assert error < relative(covariance_recursion(batches, ridge, np.float32), want) / 10


@pytest.mark.slow
def test_vmap_over_ridges_is_a_loop(getkey):
    x, y = samples(getkey(), 30)
    ridges = jnp.array([1e-2, 1.0, 10.0])

    def fit(ridge):
        head = RecursiveLeastSquares.start(FEATURES, OUTPUTS, ridge=ridge)
        return head.update(x[:20], y[:20]).update(x[20:], y[20:]).weight()

    for weight, ridge in zip(jax.jit(jax.vmap(fit))(ridges), ridges, strict=True):
        assert relative(weight, ridge_regression(x, y, float(ridge))) < 1e-3


@pytest.mark.slow
def test_rows_of_zeros_are_no_samples_and_half_precision_is_read(getkey):
    x, y = (a.astype(jnp.bfloat16) for a in samples(getkey(), 20, steepness=0.5))
    head = RecursiveLeastSquares.start(FEATURES, OUTPUTS)
    short = update(head, x, y).weight()
    filled = update(head, *(jnp.pad(a, ((0, 12), (0, 0))) for a in (x, y))).weight()
    assert short.dtype == jnp.float32
    assert relative(filled, short) < 1e-5
    assert relative(short, ridge_regression(x, y, 1.0)) < 1e-5


def test_without_a_ridge_it_is_finite_and_meets_what_few_samples_say(getkey):
    head = RecursiveLeastSquares.start(FEATURES, OUTPUTS, ridge=0.0)
    assert np.all(head.weight() == 0)
    x, y = samples(getkey(), 4, steepness=0.5)
    weight = update(head, x, y).weight()
    assert np.all(np.isfinite(weight))
    assert relative(x @ weight.T, y) < 1e-3


def test_refuses():
    head = RecursiveLeastSquares.start(FEATURES, OUTPUTS)
    with pytest.raises(ValueError, match=r"12 features and 3 outputs .* got \(4, 11\)"):
        head.update(jnp.ones((4, 11)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="adds outputs to the 3 that there are, got 2"):
        head.with_outputs(2)
