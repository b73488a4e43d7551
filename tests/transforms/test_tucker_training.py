"""Training of tensors in Tucker form, whose bases move and whose ranks adapt."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.lowrank import TuckerForm, tucker_tangent, tucker_truncate
from tests.helpers import all_finite, assert_close, relative_error
from tests.reference import tucker_training as reference
from tests.test_tucker_ranks import SHAPE, cut, loss, orthonormal_form


WIDE = (6, 6, 5)


def training(tx, target, steps):
    """Some steps on one target; the parameters and the ranks after each."""

    def run(x, target):
        value = lambda x: loss(x.materialize(), target)
        again = jax.value_and_grad(value)

        def step(carry, _):
            x, state = carry
            grads = again(x)[1]
            updates, state = tx.update(grads, state, x, value_and_grad_fn=again)
            x = optax.apply_updates(x, updates)
            return (x, state), (x, state.rank)

        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[1]

    return run


def with_zeros(x):
    """A form that is not masked, whose columns out of use are zeros of the core."""
    return TuckerForm(x.masked_core(), x.factors)


@pytest.mark.slow
def test_two_gradients_are_the_published_step_with_arrays_that_change_shape(getkey, x64):
    """Thirty steps, for several tolerances at once, in one program."""
    target = 3 * jr.normal(getkey(), SHAPE)
    start = orthonormal_form(getkey(), widths=WIDE, ranks=(2, 2, 2))
    levels, rate = jnp.array([0.02, 0.2, 0.4]), 0.3

    def run(level, x, target):
        tx = lrjax.dynamical_low_rank(optax.sgd(rate), level, method="kls")
        return training(tx, target, 30)(x, target)

    found, ranks = jax.jit(jax.vmap(run, (0, None, None)))(
        levels, with_zeros(start), target
    )
    gradient = lambda w: np.tanh(w - np.asarray(target))
    for k, level in enumerate(np.asarray(levels)):
        other = cut(start)
        for t in range(30):
            other = reference.step(*other, gradient, rate, level, WIDE)
            assert tuple(ranks[k, t].tolist()) == other[0].shape
        last = jax.tree.map(lambda leaf, k=k: leaf[k, -1], found)
        assert relative_error(last.materialize(), reference.value(*other)) < 1e-11
    assert len({tuple(r) for r in np.asarray(ranks).reshape(-1, 3).tolist()}) > 3


@pytest.mark.slow
def test_one_gradient_is_a_step_along_the_tangent(getkey, x64):
    target = jr.normal(getkey(), SHAPE)
    x = with_zeros(orthonormal_form(getkey(), widths=(3, 3, 3), ranks=(2, 3, 2)))
    tx = lrjax.dynamical_low_rank(optax.sgd(0.4), 0.1)
    got, ranks = jax.jit(training(tx, target, 1))(x, target)
    slope = np.tanh(np.asarray(x.materialize() - target))
    used = cut(TuckerForm(x.core, x.factors, (2, 3, 2)))
    moved = np.asarray(x.materialize()) - 0.4 * reference.tangent_projection(*used, slope)
    eyes = [np.eye(n) for n in SHAPE]
    want, bases = reference.truncated(moved, eyes, 0.1, (3, 3, 3))
    last = jax.tree.map(lambda leaf: leaf[-1], got)
    assert_close(last.materialize(), reference.value(want, bases), condition=1e4)
    assert tuple(ranks[-1].tolist()) == want.shape


@pytest.mark.slow_but("kls")
@pytest.mark.parametrize("method", ["parallel", "kls"])
def test_a_tensor_of_two_axes_is_trained_as_a_matrix(getkey, method, x64):
    target = jr.normal(getkey(), (8, 6))
    matrix = lrjax.svd(lrjax.truncate(jr.normal(getkey(), (8, 6)), 4))
    tensor = TuckerForm(matrix.core, (matrix.left, matrix.right))
    tx = lrjax.dynamical_low_rank(optax.sgd(0.3, momentum=0.5), 0.2, method=method)
    run = jax.jit(training(tx, target, 10))
    (got, ranks), (want, rank) = run(tensor, target), run(matrix, target)
    assert_close(got.materialize(), want.materialize(), condition=1e4)
    np.testing.assert_array_equal(ranks, np.stack([rank, rank], -1))


@pytest.mark.slow
def test_a_step_of_zero_moves_nothing(getkey):
    x = tucker_truncate(orthonormal_form(getkey(), widths=(3, 3, 3)), (3, 3, 3))
    zero = jax.tree.map(jnp.zeros_like, x)
    tx = lrjax.dynamical_low_rank(optax.sgd(0.1), 0.0)
    updates, state = jax.jit(tx.update)(zero, tx.init(x), x)
    for u in jax.tree.leaves(updates):
        np.testing.assert_allclose(u, jnp.zeros_like(u), atol=2e-5)
    assert state.rank.tolist() == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["parallel", "augmented"])
def test_a_convolution_is_trained_and_its_ranks_fall(getkey, method):
    """A stack of two kernels, by Adam, in one program for both tolerances."""
    conv = lambda key: lrjax.nn.TuckerConv(2, 4, 8, 3, (6, 4), key=key)
    xs = jr.normal(getkey(), (16, 4, 6, 6))
    small = lrjax.nn.TuckerConv(2, 4, 8, 3, (2, 2), key=getkey())
    ys = jax.vmap(small)(xs)
    params, static = eqx.partition(conv(getkey()), eqx.is_inexact_array)
    error = lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(xs) - ys) ** 2)

    def run(tol):
        tx = lrjax.dlrt(0.02, tol=tol, method=method)

        def step(carry, _):
            p, state = carry
            value, grads = jax.value_and_grad(error)(p)
            updates, state = tx.update(grads, state, p)
            return (eqx.apply_updates(p, updates), state), value

        (p, state), values = jax.lax.scan(step, (params, tx.init(params)), length=60)
        return p, state.rank.weight, values

    p, ranks, values = jax.jit(jax.vmap(run))(jnp.array([0.01, 0.3]))
    assert all_finite(p)
    assert np.all(np.asarray(values[:, -1]) < 0.5 * np.asarray(values[:, 0]))
    assert np.all(ranks[1] <= ranks[0])
    assert np.sum(ranks[1]) < np.sum(ranks[0])


def test_refuses_bases_wider_than_the_others_multiplied(getkey):
    x = orthonormal_form(getkey(), widths=(5, 2, 2))
    tx = lrjax.dynamical_low_rank(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"the other widths multiplied.*\[5, 2, 2\]"):
        tx.init(x)


@pytest.mark.slow
def test_tangent_of_a_stack_is_that_of_its_members(getkey):
    x = orthonormal_form(getkey(), batch=(2,))
    slope = orthonormal_form(getkey(), batch=(2,))
    both = tucker_tangent(x, slope).materialize()
    one = jax.tree.map(lambda leaf: leaf[1], (x, slope))
    assert_close(both[1], tucker_tangent(*one).materialize(), condition=100)
