import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._arguments import check_key
from ...linalg import orthonormalize, outer, working_dtype
from ..find import check_used_once, find_sites, fold_in_path
from ..sites import Site, flat_leaves, layer_site
from ..where import Where, pick
from .statistic import InputStatistic
from .stream import summed


def activation_statistics(
    call: Callable[[PyTree, Any], PyTree],
    model: PyTree,
    batches: Iterable[Any],
    *,
    where: Where = None,
    rank: int | None = None,
    sensitivity: bool = False,
    key: PRNGKeyArray | None = None,
) -> dict[str, InputStatistic]:
    """First and second moments of the inputs of layers, over a stream of batches.

    The input of a layer is the x in ``W x``: of a convolution each of its patches. Without
    a rank, ``Σ x xᵀ (in, in)`` of each; with one, ``Σ x (xᵀ Ω)`` for random Ω of that
    width. Both are sums over all inputs: those of other batches are added with ``+``, in
    one pass over a stream of which nothing is kept. Of batches that a mesh shards they are
    global; where ``shard_map`` hands out parts, ``psum`` adds them up.

    The sensitivity is ``Σ g gᵀ (out, out)`` with the gradients g of ``Σ ± outputs`` of
    ``call``, the signs drawn anew in each batch. In the mean over signs that is ``Σ Jᵀ J``
    with the Jacobian J of all outputs: how far a change of what the layer gives moves them.

    The layers are found where they are called, in scans, under ``vmap`` and in attention:
    the sums are the gradient with respect to zeros beside the weights, whose cotangents
    are set to what has to be summed. So a layer must reach the output of ``call`` in a
    differentiable way.

    Args:
        call: ``(model, batch) -> outputs``, any tree with floating-point arrays.
        model: what :func:`lrjax.adapt` is given.
        batches: anything to go through once.
        where: which layers, as in :func:`lrjax.adapt`; arrays that are no layers have no
            inputs.
        rank: the width of Ω; a few times the rank that is asked for later.
        sensitivity: whether to sum it.
        key: for Ω and the signs.

    Returns:
        ``{path: statistic}``, for ``lrjax.adapt(…, data=…)``.

    Raises:
        ValueError: if there are no batches, if a picked site is no layer that acts as a
            product or its output does not reach that of ``call``, if there is a rank
            or a sensitivity and no key.

    Example:
        >>> import equinox as eqx, jax, lrjax
        >>> model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
        >>> call = lambda model, x: jax.vmap(model)(x)
        >>> batches = jax.random.normal(jax.random.key(1), (3, 5, 4))
        >>> statistics = lrjax.adapters.activation_statistics(call, model, batches)
        >>> statistics["layers.0"].count.item()
        15.0
        >>> kind = lrjax.LoRA(2, init="eva")
        >>> adapters = lrjax.adapt(model, kind, data=statistics, key=jax.random.key(2))

    Reference:
        F. Paischer et al., "One initialization to rule them all: fine-tuning via explained
        variance adaptation" (2024), arXiv:2410.07170, for what they are good for.
    """
    check_key("activation_statistics", key)
    if key is None and (rank is not None or sensitivity):
        drawn = "draws a sketch" if rank is not None else "and a sensitivity draws signs"
        raise ValueError(f"activation_statistics with a rank {drawn}: pass key=.")
    sites = pick(find_sites(model), where)
    check_used_once(model, sites)
    probes = {}
    for path, site in sites.items():
        _check_layer(site)
        if rank is not None and key is not None:
            probes[path] = _probe(site, rank, fold_in_path(key, path))
    signs = key if sensitivity else None
    sums = sums_of_inputs(
        "activation_statistics", call, model, batches, sites, probes=probes, signs=signs
    )
    _check_seen({path: statistic.count for path, statistic in sums.items()})
    return sums


def sums_of_inputs(
    name: str,
    call: Callable[[PyTree, Any], PyTree],
    model: PyTree,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    probes: Mapping[str, Array] | None = None,
    signs: PRNGKeyArray | None = None,
) -> dict[str, InputStatistic]:
    """The statistics of some layers; with signs their sensitivity too.

    Of a layer that no batch reached all sums are zero.
    """
    probes, number = dict(probes or {}), itertools.count()

    def of(batch: Any) -> dict[str, InputStatistic]:
        own = None if signs is None else jr.fold_in(signs, next(number))
        return _sums(call, model, tuple(paths), probes, batch, own)

    sums, _ = summed(name, of, batches)
    with_probe = lambda path, one: eqx.tree_at(
        lambda one: one.probe, one, probes.get(path), is_leaf=lambda x: x is None
    )
    return {path: with_probe(path, one) for path, one in sums.items()}


def _check_layer(site: Site) -> None:
    if site.kind in ("array", "vector"):
        raise ValueError(
            f"{site.path or 'the root'} is an array that other code reads: what it is "
            "multiplied with is not seen. Leave it out with where=."
        )
    site.check()


def _probe(site: Site, rank: int, key: PRNGKeyArray) -> Array:
    """The directions of a sketch, of their own for each matrix of a stack."""
    n, dtype = site.shape[1], working_dtype(site.dtype)
    return orthonormalize(jr.normal(key, (*site.stack, n, min(rank, n)), dtype))


@eqx.filter_jit
def _sums(
    call: Callable,
    model: PyTree,
    paths: tuple[str, ...],
    probes: dict[str, Array],
    batch: Any,
    signs: PRNGKeyArray | None,
) -> dict[str, InputStatistic]:
    """The sums over one batch, without probes."""
    sites = find_sites(model)
    zeros = {
        path: _zeros(sites[path], probes.get(path), signs is not None) for path in paths
    }

    def total(zeros: dict[str, InputStatistic]) -> Array:
        tapped = lambda path: Tapped(sites[path].layer, zeros[path], probes.get(path), path)
        leaves, treedef = flat_leaves(model)
        new = [tapped(path) if path in zeros else leaf for path, leaf in leaves]
        outputs = call(treedef.unflatten(new), batch)
        floating = filter(eqx.is_inexact_array, jax.tree.leaves(outputs))
        signed = enumerate(x.real for x in floating)
        return sum((_signed_sum(x, signs, i) for i, x in signed), jnp.zeros(()))

    return jax.grad(total)(zeros)


def _signed_sum(x: Array, signs: PRNGKeyArray | None, index: int) -> Array:
    if signs is None:
        return jnp.sum(x)
    return jnp.sum(x * jr.rademacher(jr.fold_in(signs, index), x.shape, x.dtype))


def _zeros(site: Site, probe: Array | None, sensitivity: bool) -> InputStatistic:
    (m, n), dtype = site.shape, working_dtype(site.dtype)
    zeros = lambda *shape: jnp.zeros((*site.stack, *shape), dtype)
    image = None
    if probe is not None:
        image = zeros(n, probe.shape[-1])
    elif site.kind != "lookup":
        image = zeros(n, n)
    of_outputs = zeros(m, m) if sensitivity else None
    return InputStatistic(image, zeros(n), zeros(), zeros(), None, of_outputs)


class Tapped(eqx.Module):
    """A layer that acts as before and notes its inputs, in the gradient of its sums."""

    layer: Any
    sums: InputStatistic
    probe: Array | None
    path: str = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        site = layer_site(self.path, self.layer)
        if not site.acts:  # it may do anything with its weight
            return self.layer(*args, **kwargs)
        return site.plus_bias(self._noting(site.frozen(), *args, **kwargs), site.bias)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self.__dataclass_fields__:
            raise AttributeError(name)
        return getattr(self.layer, name)

    def _noting(self, site: Site, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """The output without the bias, tied to the sums."""
        del key
        sums, dtype = self.sums, self.sums.total.dtype
        ones = jnp.ones((len(sums.total), 1), dtype)
        # Patches are copies of numbers of x: their squares are the patches of the squares.
        squares = x if site.kind == "lookup" else x**2
        lengths = site.down(ones, squares)[..., 0]
        one = jnp.ones_like(lengths)
        moments, seen = sums.total[:, None], one[..., None]
        if sums.image is not None:
            probe = jnp.eye(len(ones), dtype=dtype) if self.probe is None else self.probe
            moments = jnp.concatenate([sums.image, moments], axis=1)
            seen = jnp.concatenate([site.down(probe, x), seen], axis=-1)
        tied = site.down(moments, x)
        # Of all inputs, so that under vmap there is one for each.
        nothing = lax.stop_gradient(tied[..., 0])
        linear = (tied, sums.energy + nothing, sums.count + nothing)
        values = lax.stop_gradient((seen, lengths, one))
        return _noted(site.base(x), linear, sums.sensitivity, values)


@jax.custom_vjp
def _noted(y: Array, linear: PyTree, squared: Array | None, values: PyTree) -> Array:
    """``y``; in the backward pass ``values`` are the cotangents of ``linear``.

    That of ``squared`` is ``g gᵀ`` for the cotangent g of ``y``.
    """
    del linear, squared, values
    return y


def _noted_forward(y, linear, squared, values):
    return y, (squared, values)


def _noted_backward(kept, cotangent):
    squared, values = kept
    if squared is not None:
        g = cotangent.reshape(len(squared), -1).astype(squared.dtype)
        squared = outer(g, g)
    return cotangent, values, squared, jax.tree.map(jnp.zeros_like, values)


_noted.defvjp(_noted_forward, _noted_backward)


def _check_seen(counts: dict[str, Array]) -> None:
    known = {k: v for k, v in counts.items() if not isinstance(v, Tracer)}
    if unseen := [path for path, count in known.items() if not jnp.all(count > 0)]:
        raise ValueError(
            f"No inputs were seen at {unseen}: the layer is not called in call(model, "
            "batch), has a __call__ of its own, or its output does not reach that of call "
            "in a differentiable way. Leave it out with where=."
        )
