"""Statistics of the user on their way to the kinds: ``adapt(..., data=)``."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest

import lrjax
from lrjax.adapters import AdapterKind, WithMagnitude
from tests.helpers import assert_close


class Given(AdapterKind):
    """The dense change that the data say, as a copy of the weight."""

    @property
    def takes_data(self):
        return True

    def init(self, site, *, key, pool, data=None):
        return lrjax.adapters.FullCopy(site.read() + data["step"], None)


def layers(key):
    make = eqx.filter_vmap(lambda k: eqx.nn.Linear(3, 2, key=k))
    one, many = jr.split(key)
    return {"one": eqx.nn.Linear(4, 4, key=one), "many": make(jr.split(many, 5))}


def test_each_matrix_gets_its_own_statistic(getkey):
    model = layers(getkey())
    step = {"one": jnp.ones((4, 4)), "many": jr.normal(getkey(), (5, 2, 3))}
    data = {path: {"step": x} for path, x in step.items()}
    adapters = lrjax.adapt(model, Given(), key=getkey(), data=data)
    merged = lrjax.merge(model, adapters)
    for path, x in step.items():
        assert_close(merged[path].weight, model[path].weight + x, condition=10)


def test_a_wrapper_passes_it_on_and_a_rule_may_mix(getkey):
    model = layers(getkey())
    data = {"many": {"step": jnp.zeros((5, 2, 3))}}
    kinds = {"many": WithMagnitude(Given()), "one": lrjax.LoRA(2)}
    adapters = lrjax.adapt(
        model, lambda path, site: kinds.get(path), key=getkey(), data=data
    )
    assert_close(adapters["many"].inner.matrix, model["many"].weight, condition=1)


def test_missing_superfluous_and_unfitting_paths_are_named(getkey):
    model, key = layers(getkey()), getkey()
    one, many = {"step": jnp.zeros((4, 4))}, {"step": jnp.zeros((5, 2, 3))}
    with pytest.raises(ValueError, match=r"Given starts from data.*nothing for \['many'\]"):
        lrjax.adapt(model, Given(), key=key, data={"one": one})
    data = {"one": one, "many": many, "else": one}
    with pytest.raises(ValueError, match=r"data= has \['else'\], where no adapter"):
        lrjax.adapt(model, Given(), key=key, data=data)
    with pytest.raises(ValueError, match=r"has \['one'\], where no adapter"):
        lrjax.adapt(model, lrjax.LoRA(2), key=key, data={"one": one})
    with pytest.raises(ValueError, match=r"'many', which is a stack \(5,\)"):
        lrjax.adapt(model, Given(), key=key, data={"one": one, "many": one})
