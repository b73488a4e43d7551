import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from lrjax import recovery
from lrjax.lowrank import TuckerForm


SHAPE, RANKS = (20, 16, 12), (2, 3, 2)
STATIC = ("ranks", "max_steps")
robust = jax.jit(recovery.fit_robust_tensor, static_argnames=STATIC)
completion = jax.jit(recovery.fit_tensor_completion, static_argnames=STATIC)


def truth(key, shape=SHAPE, ranks=RANKS):
    """Entries of size one, and a core that is far from singular in every unfolding."""
    keys = jr.split(key, len(shape) + 1)
    factors = [
        jnp.linalg.qr(jr.normal(k, (n, r)))[0]
        for k, n, r in zip(keys[1:], shape, ranks, strict=True)
    ]
    core = jr.orthogonal(keys[0], 6)[: ranks[0], :].reshape(ranks)
    x = TuckerForm(core, factors).materialize()
    return x / jnp.sqrt(jnp.mean(x * x))


def corrupted(key, x, share, observed=1.0, noise=0.0):
    where, size, seen, rest = jr.split(key, 4)
    errors = 5 * jr.uniform(size, x.shape, minval=-1, maxval=1)
    y = x + jnp.where(jr.bernoulli(where, share, x.shape), errors, 0)
    y = y + noise * jr.normal(rest, x.shape)
    return jnp.where(jr.bernoulli(seen, observed, x.shape), y, jnp.nan)


def error(fit, x):
    return float(jnp.linalg.norm(fit.low_rank.materialize() - x) / jnp.linalg.norm(x))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "observed"), [(0.2, 1.0), (0.1, 0.6)])
def test_separates_told_nothing(share, observed, getkey):
    x = truth(getkey())
    fit = robust(corrupted(getkey(), x, share, observed))
    assert error(fit, x) < 1e-4
    assert tuple(fit.ranks.tolist()) == RANKS
    assert bool(fit.converged)
    assert bool(fit.trusted)


def test_the_sparse_part_is_the_errors_and_nothing_else(getkey):
    x = truth(getkey())
    y = corrupted(getkey(), x, 0.1, 0.8)
    fit = robust(y)
    want = jnp.where(jnp.isfinite(y), y - x, 0)
    np.testing.assert_allclose(fit.sparse, want, atol=1e-3)
    small = jnp.abs(want) < 1e-4  # rounding of y − x where there is none
    assert float(jnp.max(jnp.abs(jnp.where(small, fit.sparse, 0)))) < 1e-3


@pytest.mark.slow
def test_noise_does_not_become_signal(getkey):
    """Told nothing of it: what is found is nearer to the truth than what was seen."""
    x = truth(getkey())
    for fit in (
        robust(corrupted(getkey(), x, 0.05, noise=0.1)),
        completion(corrupted(getkey(), x, 0.0, 0.5, noise=0.1)),
    ):
        assert error(fit, x) < 0.1
        assert bool(fit.trusted)


def test_completes_from_a_third(getkey):
    x = truth(getkey())
    fit = completion(corrupted(getkey(), x, 0.0, 0.35))
    assert error(fit, x) < 1e-4
    assert tuple(fit.ranks.tolist()) == RANKS
    assert float(jnp.max(jnp.abs(fit.sparse))) == 0


@pytest.mark.slow
def test_axes_and_units_may_change(getkey):
    """Permuted axes permute the result; another unit scales it."""
    x = truth(getkey())
    y = corrupted(getkey(), x, 0.1)
    want = robust(y).low_rank.materialize()
    for scale in (1e-10, 1e10):
        got = robust(scale * y).low_rank.materialize() / scale
        np.testing.assert_allclose(got, want, atol=1e-4)
    turned = robust(jnp.transpose(y, (2, 0, 1)))
    got = jnp.transpose(turned.low_rank.materialize(), (1, 2, 0))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_center_is_no_direction(getkey):
    """Far from zero it costs no rank, and what carries it is orthonormal with the rest."""
    x = truth(getkey())
    for method, y in (
        (robust, corrupted(getkey(), x, 0.1, 0.8)),
        (completion, corrupted(getkey(), x, 0.0, 0.5)),
    ):
        fit = method(y + 100.0)
        assert tuple(fit.ranks.tolist()) == RANKS
        assert bool(fit.trusted)
        np.testing.assert_allclose(fit.center, 100.0, atol=1e-3)
        np.testing.assert_allclose(fit.low_rank.materialize(), x + 100.0, atol=1e-3)
        for factor, rank in zip(fit.low_rank.factors, RANKS, strict=True):
            used = factor[:, : rank + 1]
            np.testing.assert_allclose(used.T @ used, np.eye(rank + 1), atol=1e-4)
            assert float(jnp.max(jnp.abs(factor[:, rank + 1 :]))) == 0


@pytest.mark.slow
def test_a_full_axis_holds_the_center(getkey):
    """An axis of as many directions as entries has no room for one more, and no need."""
    x = truth(getkey(), (12, 3, 10), RANKS)
    fit = completion(corrupted(getkey(), x, 0.0, 0.9) - 7.0)
    np.testing.assert_allclose(fit.low_rank.materialize(), x - 7.0, atol=1e-3)


@pytest.mark.slow
def test_several_tensors_at_once():
    keys = jr.split(jr.key(0), 2)
    xs = jnp.stack([truth(k) for k in keys])
    ys = jnp.stack([corrupted(k, x, 0.1) for k, x in zip(keys, xs, strict=True)])
    fits = jax.jit(jax.vmap(recovery.fit_robust_tensor))(ys)
    for k, x in enumerate(xs):
        assert error(jax.tree.map(lambda leaf, k=k: leaf[k], fits), x) < 1e-4


def test_what_cannot_be_found_is_not_trusted(getkey):
    """Nothing but noise, and errors in seven tenths of the entries."""
    for y in (
        jr.normal(getkey(), SHAPE),
        corrupted(getkey(), truth(getkey()), 0.7),
    ):
        assert not bool(robust(y).trusted)


def test_nothing_stays_nothing():
    fit = robust(jnp.zeros(SHAPE))
    assert fit.ranks.tolist() == [0, 0, 0]
    assert float(jnp.max(jnp.abs(fit.low_rank.materialize()))) == 0


X = jnp.ones((4, 3, 2))


@pytest.mark.parametrize(
    ("tensor", "options", "kind", "message"),
    [
        (jnp.ones(4), {}, ValueError, "two axes"),
        (X > 0, {}, TypeError, "boolean"),
        (X, {"mask": X}, ValueError, "mask must be boolean"),
        (X, {"mask": X[0] > 0}, ValueError, r"\(4, 3, 2\); got \(3, 2\)"),
        (X, {"ranks": (2, 2)}, ValueError, "each of 3 axes"),
        (X, {"ranks": (2, 2, 3)}, ValueError, "between 1 and 2"),
        (X, {"tol": -1.0}, ValueError, "tol must not be negative"),
    ],
)
def test_refuses(tensor, options, kind, message):
    for method in (recovery.fit_robust_tensor, recovery.fit_tensor_completion):
        with pytest.raises(kind, match=message):
            method(tensor, **options)


def test_has_no_derivative():
    with pytest.raises(ValueError, match="it decides on ranks"):
        jax.grad(lambda x: recovery.fit_robust_tensor(x, max_steps=1).residual)(X)
