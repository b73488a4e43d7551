"""Gates and masks on the rank axis, and the kinds that are made of them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import moved
from tests.helpers import assert_close
from tests.reference import adapters as reference


M, N, R = 6, 5, 4


def layer_of(getkey):
    return eqx.nn.Linear(N, M, key=getkey())


@eqx.filter_jit
def trained(layer, kind, key):
    """An adapter of which all trained numbers were moved."""
    params, frozen = lrjax.partition(lrjax.adapt(layer, kind, key=key))
    return eqx.combine(moved(params, key), frozen)


def arrays(adapters):
    factors = adapters.layers[""]
    b, a = (np.asarray(x, np.float64) for x in (factors.pair.left, factors.pair.right.T))
    return factors, b, a


@pytest.mark.slow
def test_gated_kinds_are_their_dense_formulas(getkey):
    layer = layer_of(getkey)
    weight = np.asarray(layer.weight, np.float64)
    for kind, scale in (
        (room.AdaLoRA(R, alpha=3.0), 3 / (R + 1e-5)),
        (room.SoRA(R, alpha=3.0), 3 / R),
    ):
        adapters = trained(layer, kind, getkey())
        factors, b, a = arrays(adapters)
        gate = np.asarray(factors.gate, np.float64)
        want = reference.gated(weight, b, gate, a, scale)
        assert_close(lrjax.merge(layer, adapters).weight, want.astype(np.float32))
        # With a gate of ones it is LoRA.
        ones = eqx.tree_at(lambda x: x.layers[""].gate, adapters, jnp.ones(R))
        want = reference.lora(weight, b, a, scale)
        assert_close(lrjax.merge(layer, ones).weight, want.astype(np.float32))


def test_adalora_starts_as_published(getkey):
    layer = eqx.nn.Linear(500, 400, key=getkey())
    factors = lrjax.adapt(layer, room.AdaLoRA(20), key=getkey()).layers[""]
    assert not np.any(factors.gate)
    for factor in (factors.pair.left, factors.pair.right):
        # 8,000 or more normal numbers: six standard errors of their deviation.
        assert abs(np.std(factor) / 0.02 - 1) < 6 / np.sqrt(2 * 8000)
    assert_close(factors.scale, jnp.float32(20 / (20 + 1e-5)))


@pytest.mark.slow
def test_prefixes_are_their_dense_formulas_in_one_program(getkey):
    layer, traces = layer_of(getkey), []
    weight = np.asarray(layer.weight, np.float64)
    laws = {
        lrjax.LoRA(R, 3.0): lambda rank: 3 / rank,
        lrjax.LoRA(R, 3.0, rank_stabilized=True): lambda rank: 3 / np.sqrt(rank),
        room.DyLoRA(R, 3.0): lambda rank: 3 / rank,
        room.NLS((R, 2), 3.0): lambda rank: 3 / R,
    }
    for kind, scale in laws.items():
        adapters = trained(layer, kind, getkey())
        _, b, a = arrays(adapters)

        @jax.jit
        def merged(rank, adapters=adapters):
            traces.append(1)
            return lrjax.merge(layer, room.with_ranks(adapters, rank)).weight

        got = [merged(jnp.int32(rank)) for rank in range(R + 1)]
        together = jax.vmap(merged)(jnp.arange(R + 1))
        for rank in range(R + 1):
            want = reference.prefix(weight, b, a, rank, scale(max(rank, 1)))
            assert_close(got[rank], want.astype(np.float32), condition=10)
            assert_close(together[rank], got[rank], condition=10)
        assert_close(got[R], lrjax.merge(layer, adapters).weight)
    assert len(traces) == len(laws)  # one for every rank, under vmap too


@pytest.mark.slow
def test_a_masked_column_has_no_gradient_and_a_zero_gate_has_one(getkey):
    """The two meanings of "pruned"."""
    layer, x = layer_of(getkey), jr.normal(getkey(), (N,))
    adapters = trained(layer, room.AdaLoRA(R), getkey())
    adapters = eqx.tree_at(lambda a: a.layers[""].gate, adapters, jnp.arange(4.0))

    def gradient(adapters):
        params, frozen = lrjax.partition(adapters)

        def loss(params):
            bound = lrjax.bind(layer, eqx.combine(params, frozen))
            return jnp.sum(bound(x) ** 2)

        return jax.grad(loss)(params).layers[""]

    free, masked = gradient(adapters), gradient(room.with_ranks(adapters, 2))
    assert np.all(free.gate)
    assert np.all(masked.gate[:2])
    for y in (masked.gate[2:], masked.pair.left[:, 2:], masked.pair.right[:, 2:]):
        assert not np.any(y)
    # A column in reserve: the factors have a gradient, the gate has none.
    mask = jnp.array([1.0, 1.0, 1e-5, 0.0])
    held = gradient(
        eqx.tree_at(lambda a: a.layers[""].mask, room.with_ranks(adapters, 2), mask)
    )
    assert np.all(held.pair.left[:, 2])
    assert not np.any(held.gate[2:])


@pytest.mark.slow
def test_capaboost_is_its_dense_formula(getkey):
    layer = eqx.nn.Linear(40, 30, key=getkey())
    kind = room.CapaBoost(3, 2.0, copies=3, density=0.4)
    adapters = trained(layer, kind, getkey())
    factors, b, a = arrays(adapters)
    ones = lrjax.LowRank(jnp.ones((30, 3)), jnp.ones((40, 3)))
    masks = factors.thinning(ones)
    left, right = (np.asarray(x, np.float64) for x in (masks.left, masks.right))
    assert set(np.unique(left)) | set(np.unique(right)) == {0.0, 1.0}
    # 630 coins: six standard errors.
    share = np.concatenate([left.ravel(), right.ravel()]).mean()
    assert abs(share - 0.4) < 6 * np.sqrt(0.24 / 630)
    each = [(left[:, i : i + 3], right[:, i : i + 3].T) for i in (0, 3, 6)]
    weight = np.asarray(layer.weight, np.float64)
    want = reference.capaboost(weight, b, a, each, 2 / 3)
    got = lrjax.merge(layer, adapters).weight
    assert_close(got, want.astype(np.float32), condition=10)
    assert np.linalg.matrix_rank(want - weight) == 9
    again = lrjax.merge(layer, adapters).weight
    np.testing.assert_array_equal(again, got)
    other = eqx.tree_at(
        lambda x: x.layers[""].thinning.seed, adapters, factors.thinning.seed + 1
    )
    assert np.any(lrjax.merge(layer, other).weight != got)


@pytest.mark.slow
def test_capaboost_with_one_whole_copy_is_lora(getkey):
    layer = layer_of(getkey)
    adapters = trained(layer, room.CapaBoost(2, copies=1, density=1.0), getkey())
    _, b, a = arrays(adapters)
    want = reference.lora(np.asarray(layer.weight, np.float64), b, a, 1.0)
    assert_close(lrjax.merge(layer, adapters).weight, want.astype(np.float32))


def test_ranks_are_drawn_from_all_of_them(getkey):
    keys = jr.split(getkey(), 4000)
    for kind, ranks in ((room.DyLoRA(3), (1, 2, 3)), (room.NLS((2, 8, 4)), (2, 4, 8))):
        found, counts = np.unique(jax.vmap(kind.sample)(keys), return_counts=True)
        assert tuple(found) == ranks
        # 4,000 draws of three: six standard errors.
        assert np.all(np.abs(counts / 4000 - 1 / 3) < 6 * np.sqrt(2 / 9 / 4000))
    assert room.NLS((2, 8, 4)).middle == 4


@pytest.fixture
def stack(getkey):
    layer = lambda key: eqx.nn.Linear(N, M, key=key)
    return eqx.filter_vmap(layer)(jr.split(getkey(), 3))


@pytest.mark.slow
def test_each_layer_of_a_stack_has_its_own_rank(stack, getkey):
    adapters = trained(stack, lrjax.DoRA(R), getkey())
    ranks = jnp.array([1, 4, 2])
    some = room.with_ranks(adapters, {"": ranks})
    np.testing.assert_array_equal(room.active_ranks(some)[""], ranks)
    got = lrjax.merge(stack, some).weight
    for i, rank in enumerate(ranks):
        cut = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        one = room.with_ranks(cut(adapters), int(rank))
        assert_close(got[i], lrjax.merge(cut(stack), one).weight, condition=10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [room.AdaLoRA(R), lrjax.LoRA(R, rank_stabilized=True)])
def test_dropped_columns_change_nothing(kind, stack, getkey):
    adapters = trained(stack, kind, getkey())
    if adapters.layers[""].gate is None:
        pruned = room.with_ranks(adapters, jnp.array([1, 3, 2]))
    else:
        keep = jnp.array([[0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
        gate = keep * adapters.layers[""].gate
        pruned = eqx.tree_at(lambda a: a.layers[""].gate, adapters, gate)
    thin = room.drop_ranks(pruned)
    assert thin.layers[""].pair.rank == 3
    before, after = (room.active_ranks(x)[""] for x in (pruned, thin))
    np.testing.assert_array_equal(before, after)
    want = lrjax.merge(stack, pruned).weight
    assert_close(lrjax.merge(stack, thin).weight, want, condition=10)
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(room.drop_ranks)(pruned)


def test_masked_columns_of_a_residual_start_leave_the_base(getkey):
    layer = layer_of(getkey)
    adapters = lrjax.adapt(layer, lrjax.LoRA(R, init="pissa"), key=getkey())
    some = room.with_ranks(adapters, 2)
    assert_close(lrjax.merge(layer, some).weight, layer.weight, condition=10)
    moved = eqx.tree_at(lambda a: a.layers[""].pair.left, some, jnp.ones((M, R)))
    want = lrjax.merge(layer, moved).weight
    assert_close(lrjax.merge(layer, room.drop_ranks(moved)).weight, want, condition=10)


@pytest.mark.slow
def test_orthogonality_is_the_mean_distance_of_all_factors(getkey):
    adapters = trained(layer_of(getkey), room.AdaLoRA(R), getkey())
    _, b, a = arrays(adapters)
    each = [np.linalg.norm(g - np.eye(R)) for g in (b.T @ b, a @ a.T)]
    params, _ = lrjax.partition(adapters)
    assert_close(room.orthogonality(params), jnp.float32(np.mean(each)))
    perfect = {"w": lrjax.LowRank(jnp.eye(6)[:, :3], jnp.eye(3))}
    value, gradient = jax.value_and_grad(room.orthogonality)(perfect)
    assert value < 1e-6
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_bad_ranks_are_refused(getkey):
    layer = layer_of(getkey)
    adapters = lrjax.adapt(layer, lrjax.LoRA(R), key=getkey())
    with pytest.raises(ValueError, match=r"got 5 for ''.*rank 4"):
        room.with_ranks(adapters, 5)
    with pytest.raises(ValueError, match=r"two factors at \['other'\]"):
        room.with_ranks(adapters, {"other": 1})
    with pytest.raises(ValueError, match="two factors"):
        room.with_ranks(lrjax.adapt(layer, room.Full(), key=getkey()), 1)
    with pytest.raises(ValueError, match="only a part"):
        room.with_ranks(lrjax.partition(adapters)[1], 1)
    with pytest.raises(ValueError, match=r"no lrjax\.LowRank node"):
        room.orthogonality({"w": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="ranks to choose from"):
        room.NLS(())
    with pytest.raises(ValueError, match="at least one copy"):
        room.CapaBoost(copies=0)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        room.CapaBoost(density=0.0)
