"""Merged adapters taken off again, as far as rounding allows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lrjax
from lrjax import adapters as room
from tests.adapters.models import OneAndStack, moved


MODEL = OneAndStack(jr.key(0), 3)
KINDS = {
    "LoRA": lrjax.LoRA(2, 5.0, rank_stabilized=True),
    "a frozen start": lrjax.LoRA(2, init="pissa"),
    "a pool": lrjax.VeRA(rank=4),
    "a core": lrjax.LoRAXS(rank=2),
}


def trained(kind, key):
    adapters = lrjax.adapt(MODEL, kind, where=["one", "stack"], key=key)
    params, frozen = lrjax.partition(adapters)
    return eqx.combine(moved(params, key), frozen)


@pytest.mark.parametrize("name", KINDS)
def test_is_off_by_half_a_unit_on_either_side(name, getkey):
    @jax.jit
    def there_and_back(key):
        adapters = trained(KINDS[name], key)
        merged = lrjax.merge(MODEL, adapters)
        return merged.one, merged.stack, room.unmerge(merged, adapters)

    *merged, back = there_and_back(getkey())
    for whole, got, was in zip(
        merged, (back.one, back.stack), (MODEL.one, MODEL.stack), strict=True
    ):
        whole, got, was = (np.asarray(x.weight, np.float64) for x in (whole, got, was))
        assert np.abs(whole - was).max() > 1e-3
        half = np.finfo(np.float32).eps / 2 * (np.abs(whole) + np.abs(was))
        # The product is computed twice, with some rounding of its own.
        slack = 16 * np.finfo(np.float32).eps * np.abs(whole - was).max()
        assert np.all(np.abs(got - was) <= half + slack)


@pytest.mark.parametrize("kind", [lrjax.DoRA(2), room.Full(), room.OFT(2), room.HiRA(2)])
def test_kinds_that_depend_on_the_weight_are_refused(kind, getkey):
    layer = eqx.nn.Linear(4, 6, key=getkey())
    adapters = lrjax.adapt(layer, kind, where=lambda *_: True, key=getkey())
    with pytest.raises(ValueError, match="no product of factors that could be taken off"):
        room.unmerge(lrjax.merge(layer, adapters), adapters)


def test_half_precision_is_refused(getkey):
    layer = eqx.nn.Linear(4, 6, key=getkey(), dtype=jnp.bfloat16)
    adapters = lrjax.adapt(layer, lrjax.LoRA(2), key=getkey())
    with pytest.raises(ValueError, match="bfloat16, whose rounding is of the size"):
        room.unmerge(lrjax.merge(layer, adapters), adapters)
