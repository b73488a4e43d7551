"""What is refused, in sentences."""

import equinox as eqx
import jax.numpy as jnp
import pytest

import lrjax
from lrjax import nn


pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def test_layers_refuse_what_they_cannot_be_made_of(getkey):
    key = getkey()
    linear = nn.LowRankLinear(6, 4, 2, key=key)
    conv = nn.LowRankConv(2, 3, 4, 3, 2, key=key)
    node = linear.weight
    with pytest.raises(ValueError, match=r"takes one input of shape \(6,\), got \(5, 6\)"):
        linear(jnp.ones((5, 6)))
    with pytest.raises(ValueError, match="3 channels and 2 spatial axes"):
        conv(jnp.ones((2, 8, 8)))
    with pytest.raises(ValueError, match="one integer"):
        nn.LowRankEmbedding(6, 4, 2, key=key)(jnp.arange(3))
    with pytest.raises(ValueError, match="rank must be between 1 and"):
        nn.LowRankLinear(6, 4, 5, key=key)
    with pytest.raises(TypeError, match="integer as rank"):
        nn.LowRankLinear(6, 4, 0.5, key=key)
    with pytest.raises(ValueError, match="form must be"):
        nn.LowRankLinear(6, 4, 2, form="tucker", key=key)
    with pytest.raises(ValueError, match="scheme must be one of"):
        nn.LowRankConv(2, 3, 4, 3, 2, scheme="rows", key=key)
    with pytest.raises(TypeError, match="from_node takes"):
        nn.LowRankLinear.from_node(jnp.ones((4, 6)))
    with pytest.raises(ValueError, match="bias of shape"):
        nn.LowRankLinear.from_node(node, jnp.ones(6))
    with pytest.raises(ValueError, match=r"weight of shape \(4, 27\)"):
        nn.LowRankConv.from_node(node, like=conv)
    with pytest.raises(TypeError, match="like="):
        nn.LowRankConv.from_node(node, like=linear)
    grouped = eqx.nn.Conv2d(4, 4, 3, groups=2, key=key)
    kernel = lrjax.lowrank.higher_order_svd(grouped.weight, (2, 2, 3, 3))
    with pytest.raises(ValueError, match="no groups"):
        nn.TuckerConv.from_node(kernel, like=grouped)
    with pytest.raises(ValueError, match="a rank between 1 and n for each axis"):
        nn.TuckerConv(2, 3, 4, 3, (5, 2), key=key)
