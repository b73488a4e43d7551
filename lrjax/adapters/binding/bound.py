from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._sites import Held, Site, layer_site, over_stack, register_layer
from ..protocol import Adapter, Ready, with_stopped_gradients
from ._dropout import dropout


def prepared(site: Site, adapter: Adapter, pool: Held | None) -> Ready:
    """The adapter made ready for the weight, a stack of them at once."""
    prepare = type(adapter).prepare  # no bound method, which Equinox makes a module
    return over_stack(lambda part, own: prepare(own, part, pool), site, adapter)


def adapted(site: Site, ready: Ready, *, frozen: bool) -> Any:
    """The layer, or array, with its weight adapted, dense; rounded once."""

    def one(part: Site, ready: Ready) -> tuple[Array, Array | None]:
        source = part.frozen() if frozen else part
        return ready.weight(source.read()), ready.bias(part.bias)

    return site.put(*over_stack(one, site, ready))


class Bound(eqx.Module):
    """A layer with its adapter: called like the layer, and with its attributes.

    Every attribute and method that may read the weight is that of the layer with the
    adapted weight, so that a tied head or a method of an own class sees what the call
    uses. No gradient reaches the weight of the layer; its bias has one.
    """

    layer: Any
    adapter: Adapter
    ready: Ready
    pool: Held | None
    key: Any  # a key, or keys (*b,) for stacked layers, or None
    path: str = eqx.field(static=True)
    dense: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted output; a ``key`` replaces that of :func:`bind` for dropout."""
        if self.site.acts:
            return self._act(*args, **kwargs)
        return self.merged()(*args, **kwargs)

    def _act(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        site = self.site
        y = self.without_bias(x, self.key if key is None or self.key is None else key)
        return site.plus_bias(y, self.ready.bias(site.bias))

    @property
    def site(self) -> Site:
        """How the layer is seen."""
        return layer_site(self.path, self.layer)

    def without_bias(self, x: Array, key: PRNGKeyArray | None) -> Array:
        """``W' x``, or with a key ``W x + (W' − W) drop(x)``."""
        site, rate = self.site.frozen(), self.adapter.dropout_rate()
        if key is None or rate is None or site.kind == "lookup":
            return self.ready.output(site, x)
        y = site.base(x)
        dropped = dropout(key, jax.lax.stop_gradient(rate), jnp.asarray(x))
        return y + self.ready.change(site, dropped).astype(y.dtype)

    def merged(self) -> Any:
        """The plain layer with the adapted weight, through which no gradient meets W."""
        return adapted(self.site, self.ready, frozen=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self.__dataclass_fields__:
            raise AttributeError(name)
        if not hasattr(self.layer, name):
            raise AttributeError(f"{type(self.layer).__name__} has no attribute {name!r}")
        value = vars(self.layer).get(name, self)  # a field, or else a method or property
        if value is None or isinstance(value, (str, int, float, tuple)):
            return value
        if not all(map(eqx.is_array, jax.tree.leaves(self.ready))):
            raise ValueError(
                f"{name} of the bound layer at {self.path!r} is computed, it cannot be "
                "replaced (eqx.tree_at): use lrjax.merge, or leave the layer out."
            )
        return getattr(self.merged(), name)


@register_layer(Bound)
class BoundSite(Site):
    """A bound layer as the base of another adapter, on top of the first."""

    @property
    def kind(self):
        """That of the layer."""
        return self._inner.kind

    @property
    def acts(self):
        """Whether the layer acts as a matrix."""
        return self._inner.acts

    @property
    def bias(self):
        """The adapted bias."""
        return self.layer.ready.bias(self._inner.bias)

    @property
    def kernel_shape(self):
        """That of the layer."""
        return self._inner.kernel_shape

    @property
    def _inner(self) -> Site:
        return self.layer.site

    def matrix(self):
        """The adapted weight."""
        return layer_site(self.path, self.layer.merged()).matrix()

    def put(self, matrix, bias):
        """The plain layer with all adapters in its weight."""
        return self._inner.put(matrix, bias)

    def base(self, x):
        """The call of the bound layer, with the dropout of its own key."""
        return self.layer.without_bias(x, self.layer.key)

    def product(self, matrix, x):
        """That of the layer."""
        return self._inner.product(matrix, x)

    def down(self, right, x):
        """That of the layer."""
        return self._inner.down(right, x)

    def up(self, left, h):
        """That of the layer."""
        return self._inner.up(left, h)

    def along_outputs(self, vector):
        """That of the layer."""
        return self._inner.along_outputs(vector)

    def plus_bias(self, y, bias):
        """That of the layer."""
        return self._inner.plus_bias(y, bias)

    def matrix_axes(self):
        """That of the layer."""
        return self._inner.matrix_axes()


def held_pools(pools: dict[str, Any]) -> dict[str | None, Held | None]:
    """The pools as bound layers carry them, by group."""
    held: dict[str | None, Held | None] = {None: None}
    return held | {name: Held(with_stopped_gradients(pool)) for name, pool in pools.items()}


def is_bound(x: PyTree) -> bool:
    """Whether ``x`` is a bound layer."""
    return isinstance(x, Bound)
