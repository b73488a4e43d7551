import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ...protocol import Adapter, AdapterKind, Around, AroundKind, OwnBias, trained


class Biased(Around):
    """A bias of its own beside another adapter, whose weight it leaves alone.

    Attributes:
        own: the bias, in the shape of the layer's, trained.
        inner: the adapter of the weight.
    """

    own: Array
    inner: Adapter

    def trainable(self):
        """The bias, and what the other adapter trains."""
        spec = trained(self, lambda adapter: adapter.own)
        return eqx.tree_at(lambda a: a.inner, spec, self.inner.trainable())

    def prepare(self, site, pool):
        """That of the other adapter, and the bias."""
        return OwnBias(self.own, self.inner.prepare(site, pool))


class WithBias(AroundKind):
    """Any other kind, with the bias of the layer trained beside, outside of the model.

    ``y = W' x + b'`` with ``W'`` of the other kind and ``b' (out,)`` trained from b; where
    the layer has no bias it is the other kind alone. ``bias="lora_only"`` in PEFT.

    Args:
        kind: the other kind.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> kind = lrjax.adapters.WithBias(lrjax.LoRA(rank=2))
        >>> adapters = lrjax.adapt(model, kind, key=jax.random.key(1))
        >>> adapters["layers.0"].own.shape
        (16,)

    Reference:
        E. Ben Zaken, S. Ravfogel, Y. Goldberg, "BitFit: simple parameter-efficient
        fine-tuning for transformer-based masked language-models" (2021),
        arXiv:2106.10199, trains the biases alone.
    """

    kind: AdapterKind

    def __init__(self, kind: AdapterKind):
        self.kind = kind

    def init(self, site, *, key, pool, data=None):
        """The bias as it is, beside the other kind's adapter."""
        inner = self.kind.init(site, key=key, pool=pool, data=data)
        bias = site.read_bias()
        return inner if bias is None else Biased(own=jnp.asarray(bias), inner=inner)
