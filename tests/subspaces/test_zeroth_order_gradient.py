"""Gradients from losses alone: means, variances, settings, and what they keep in memory."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import lrjax
from lrjax.subspaces import Gaussian, RandomOrthonormal, SelectedRows
from tests.helpers import assert_close, random_low_rank


DRAWS = 4000
M, N, R = 6, 5, 2
ours = lambda path, shape: path in ("w", "")
estimate = functools.partial(lrjax.zeroth_order_gradient, where=ours)


def params_of(key, dtype=jnp.float64):
    kw, kb = jr.split(key)
    return {
        "w": jr.normal(kw, (M, N), dtype),
        "b": jr.normal(kb, (4,), dtype),
        "none": None,
    }


def linear(params, slope):
    """Two-point differences of it have no error but rounding."""
    products = jax.tree.map(lambda p, s: jnp.vdot(p, s), params, slope)
    return sum(jax.tree.leaves(products))


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def spaces(params, key):
    return {
        "all": None,
        "right": Gaussian(R, side="right"),
        "left": Gaussian(R, side="left"),
        "orthonormal": RandomOrthonormal(R, side="left"),
        "rows": SelectedRows(R, choice="uniform", side="left"),
        "both": (RandomOrthonormal(R), RandomOrthonormal(R)),
        "together": lrjax.random_subspace(params, 9, kind="dense", key=key),
    }


NAMES = list(spaces({"w": jnp.ones(10)}, jr.key(0)))


@pytest.fixture
def linear_loss(x64, getkey):
    return params_of(getkey()), params_of(getkey())


@functools.partial(jax.jit, static_argnames=("name", "queries", "ranked"))
def draws_of(params, slope, key, *, name, queries=1, ranked=False):
    """Many estimates in one subspace, flat, and one whose products are in factors."""
    subspace = spaces(params, jr.key(1))[name]
    one = functools.partial(
        estimate, linear, params, slope, key=key, subspace=subspace, queries=queries,
        ranked=ranked, scale=0.1, period=DRAWS, densify=False,
    )  # fmt: skip
    trees = jax.vmap(lambda count: one(count=count)[1])(jnp.arange(DRAWS))
    dense = lambda x: x.materialize() if lrjax.is_low_rank(x) else x
    got = jax.tree.map(dense, trees, is_leaf=lrjax.is_low_rank)
    return jax.vmap(flat)(got), jax.tree.map(lambda x: x[0], trees)


def projected(name, params, slope, factors):
    """``P Pᵀ g``, with the bases that the factors show."""
    if name == "all":
        return flat(slope)
    if name == "together":
        lift = spaces(params, jr.key(1))[name].lift
        columns = jax.vmap(lambda x: flat(lift(x)), out_axes=1)(jnp.eye(9))
        return columns @ (columns.T @ flat(slope))
    s, (left, right) = slope["w"], (factors["w"].left, factors["w"].right)
    if name == "right":
        s = s @ right @ right.T
    elif name == "both":
        q = jnp.linalg.qr(left)[0]  # times a square matrix of coordinates
        s = q @ q.T @ s @ right @ right.T
    else:
        s = left @ left.T @ s
    return flat({**slope, "w": s})


DIMENSIONS = {
    "all": M * N + 4,
    "right": M * R + 4,
    "left": R * N + 4,
    "orthonormal": R * N + 4,
    "rows": R * N + 4,
    "both": R * R + 4,
    "together": 9,
}


@pytest.mark.slow_but("together")
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_is_the_projected_gradient_and_the_variance_its_size(
    linear_loss, getkey, name
):
    """``E ĝ = P Pᵀ g`` and, of orthonormal columns, ``E ‖ĝ − Pᵀg‖² = (d + 1) ‖Pᵀg‖²``."""
    params, slope = linear_loss
    got, factors = draws_of(params, slope, getkey(), name=name)
    want = np.asarray(jax.jit(projected, static_argnums=0)(name, params, slope, factors))
    got, d = np.asarray(got), DIMENSIONS[name]
    assert np.linalg.matrix_rank(got[:200], tol=1e-9 * np.linalg.norm(got[:200])) == d
    error = got.std(axis=0) / DRAWS**0.5
    # Of fifty numbers the largest of all is rarely beyond five of its standard errors.
    assert np.all(np.abs(got.mean(axis=0) - want) < 5.5 * error + 1e-12)
    if name not in ("right", "left", "together"):  # whose columns are not orthonormal
        excess = np.sum((got - want) ** 2, axis=1) / np.sum(want**2)
        assert abs(excess.mean() - (d + 1)) < 5 * excess.std() / DRAWS**0.5


@pytest.mark.slow
def test_more_queries_are_less_noise(linear_loss, getkey):
    params, slope = linear_loss
    g = np.asarray(flat(slope))
    got, _ = draws_of(params, slope, getkey(), name="all", queries=4)
    excess = np.sum((np.asarray(got) - g) ** 2, axis=1) / np.sum(g**2)
    assert abs(excess.mean() - (g.size + 1) / 4) < 5 * excess.std() / DRAWS**0.5


@pytest.mark.slow
@pytest.mark.parametrize("queries", [2, 5])
def test_ranked_losses_point_uphill(linear_loss, getkey, queries):
    """Of a linear loss the mean is ``2/√π`` long, along the gradient."""
    params, slope = linear_loss
    key = getkey()
    got, _ = draws_of(params, slope, key, name="all", queries=queries, ranked=True)
    g, got = np.asarray(flat(slope)), np.asarray(got)
    want = 2 / np.pi**0.5 * g / np.linalg.norm(g)
    error = got.std(axis=0) / DRAWS**0.5
    assert np.all(np.abs(got.mean(axis=0) - want) < 5.5 * error)


@pytest.mark.slow
def test_ranks_are_all_that_ranked_losses_tell(linear_loss, getkey):
    params, slope = linear_loss
    bent = lambda p, s: jnp.arctan(linear(p, s)) * 1e3 - 5
    lost = lambda p, s: jnp.where(linear(p, s) > linear(params, s), jnp.nan, linear(p, s))

    @jax.jit
    def estimates(key):
        one = lambda f: estimate(f, params, slope, key=key, queries=6, ranked=True)[1]
        return one(linear), one(bent), one(lost)

    plain, same, rest = estimates(getkey())
    assert_close(same, plain)
    assert jnp.all(jnp.isfinite(flat(rest)))


@pytest.mark.slow
def test_a_smooth_loss_is_met_to_second_order(x64, getkey):
    """Along each direction the error falls as the square of the scale."""
    params, key = params_of(getkey()), getkey()
    loss = lambda p: jnp.sum(jnp.exp(0.3 * flat(p)))

    @jax.jit
    def errors(scales):
        slope = jax.grad(loss)(params)
        exact = flat(estimate(linear, params, slope, key=key)[1])
        each = jax.vmap(lambda scale: estimate(loss, params, key=key, scale=scale))(scales)
        differences = jax.vmap(flat)(each[1]) - exact[None]
        return jnp.linalg.norm(differences, axis=1), each[0] - loss(params)

    slopes, values = errors(jnp.array([1e-1, 1e-2]))
    # A hundredth, and a tenth of that at most from what comes in fourth order.
    np.testing.assert_allclose(slopes[1] / slopes[0], 0.01, rtol=0.1)
    np.testing.assert_allclose(values[1] / values[0], 0.01, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["right", "left", "orthonormal", "rows", "both"])
def test_products_may_be_left_in_factors(linear_loss, getkey, name):
    params, slope = linear_loss
    subspace = spaces(params, jr.key(0))[name]

    @jax.jit
    def both(key):
        make = functools.partial(
            estimate, linear, params, slope, key=key, subspace=subspace, queries=3
        )
        return make()[1], make(densify=False)[1]

    dense, factors = both(getkey())
    assert factors["w"].rank == R
    assert_close(factors["w"].materialize(), dense["w"], condition=100)
    assert_close(factors["b"], dense["b"])


def test_bases_stay_for_a_period_and_perturbations_do_not(linear_loss, getkey):
    params, slope = linear_loss
    key = getkey()

    @jax.jit
    def at(count):
        return estimate(
            linear, params, slope, key=key, subspace=Gaussian(R, side="right"),
            count=count, period=3, densify=False,
        )[1]["w"]  # fmt: skip

    nodes = [at(count) for count in range(4)]
    assert jnp.array_equal(nodes[0].right, nodes[2].right)
    assert not jnp.allclose(nodes[0].left, nodes[2].left)
    assert not jnp.allclose(nodes[2].right, nodes[3].right)


@pytest.mark.slow
def test_within_a_period_it_is_an_estimate_in_coordinates(linear_loss, getkey):
    """LOZO is MeZO of the left factor: ``⟨S, ξVᵀ⟩ ξVᵀ = ⟨SV, ξ⟩ ξ · Vᵀ``."""
    s = linear_loss[1]["w"]

    @jax.jit
    def node(w, key):
        return estimate(
            lambda w: jnp.vdot(w, s), w, key=key, subspace=Gaussian(R, side="right"),
            densify=False,
        )[1]  # fmt: skip

    node = node(linear_loss[0]["w"], getkey())
    slope = s @ node.right  # the gradient of the left factor
    size = jnp.vdot(slope, node.left)  # ⟨SV, ξ⟩²
    xi = node.left / jnp.sqrt(size)
    assert size > 0
    assert_close(jnp.vdot(slope, xi) * xi, node.left, condition=1e3)


@pytest.mark.slow
def test_stacks_and_halves_of_pairs_are_perturbed(getkey):
    half = random_low_rank(getkey(), 6, 5, 2)
    object.__setattr__(half, "right", None)
    params = {"stack": jnp.ones((3, 9, 8)), "half": half}
    loss = lambda p: jnp.sum(p["stack"] ** 2) + jnp.sum(p["half"].left ** 2)
    for subspace in (None, Gaussian(2), (RandomOrthonormal(2), RandomOrthonormal(3))):
        _, grads = lrjax.zeroth_order_gradient(
            loss, params, key=getkey(), subspace=subspace
        )
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        ranks = np.linalg.matrix_rank(np.asarray(grads["stack"], np.float64), tol=1e-4)
        assert np.all(ranks == (8 if subspace is None else 2))
        assert jnp.any(grads["half"].left != 0)


@pytest.mark.slow
def test_it_trains_under_scan_and_vmap_and_narrow_numbers(getkey):
    """Seeds are a batch; a vmapped run is the run of its seed."""
    target = jr.normal(getkey(), (8, 8))
    tx = optax.sgd(optax.linear_schedule(0.02, 0.0, 400))

    def train(key, dtype=jnp.float32):
        def step(carry, count):
            w, state = carry
            value, grad = lrjax.zeroth_order_gradient(
                lambda w: jnp.sum((w - target) ** 2) / 2,
                w, key=key, subspace=Gaussian(2, side="right"), count=count, period=20,
            )  # fmt: skip
            updates, state = tx.update(grad, state, w)
            return (optax.apply_updates(w, updates), state), value

        w = jnp.zeros((8, 8), dtype)
        return jax.lax.scan(step, (w, tx.init(w)), jnp.arange(400))[1]

    keys = jr.split(getkey(), 4)
    values = jax.jit(jax.vmap(train))(keys)
    assert jnp.all(values[:, -1] < 0.2 * values[:, 0])
    assert_close(jax.jit(train)(keys[1])[:50], values[1, :50], rtol=1e-3)
    narrow = jax.eval_shape(functools.partial(train, dtype=jnp.bfloat16), keys[0])
    assert narrow.dtype == jnp.float32


@pytest.mark.slow
def test_a_step_takes_the_memory_of_one_evaluation():
    """One perturbed model, and pieces of noise; factors, and sums over queries, no more."""
    shape = (4096, 2048)
    data, bytes_of = jax.ShapeDtypeStruct((4, shape[0]), jnp.float32), 4 * 4096 * 2048
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    tx = optax.sgd(0.1)

    def temporaries(**options):
        def step(w, x):
            _, grad = lrjax.zeroth_order_gradient(loss, w, x, key=jr.key(0), **options)
            return optax.apply_updates(w, tx.update(grad, tx.init(w))[0])

        w = jax.ShapeDtypeStruct(shape, jnp.float32)
        compiled = jax.jit(step, donate_argnums=0).lower(w, data).compile()
        return compiled.memory_analysis().temp_size_in_bytes / bytes_of

    assert temporaries() < 1.3
    assert temporaries(queries=8) < 1.3
    assert temporaries(subspace=Gaussian(4, side="right"), queries=8) < 1.1


def test_what_it_cannot_do_is_refused(getkey):
    w, key = jnp.ones((8, 8)), getkey()
    of = functools.partial(lrjax.zeroth_order_gradient, jnp.sum, w, key=key)
    with pytest.raises(TypeError, match=r"look at no gradient.*Got SVD"):
        of(subspace=lrjax.subspaces.SVD(2))
    with pytest.raises(ValueError, match="at least 2 queries to rank, got 1"):
        of(ranked=True)
    with pytest.raises(ValueError, match="at least 1 queries, got 0"):
        of(queries=0)
    with pytest.raises(ValueError, match="AffineSubspace of other parameters"):
        of(subspace=lrjax.random_subspace(jnp.ones(9), 2, key=key))
    with pytest.raises(ValueError, match=r"a loss that is a number, got \(8,\)"):
        lrjax.zeroth_order_gradient(lambda w: w.sum(0), w, key=key)
    with pytest.raises(TypeError, match="floating-point parameters"):
        lrjax.zeroth_order_gradient(jnp.sum, jnp.ones(3, int), key=key)
