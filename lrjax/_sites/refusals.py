"""Which layers cannot be replaced by other ones with the same call, and why."""

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..lowrank import LowRank, SVDForm
from .sites import Site, reweighted


def refusals(model: PyTree, sites: dict[str, Site], *, named: bool) -> dict[str, str]:
    """Why some of the sites cannot be factorized; an error for those that are named."""
    tied, inside = _tied(model), tuple(f"{p}." if p else "" for p in reweighted(model))
    reasons = {}
    for path, site in sites.items():
        reason = _refusal(site, tied, path.startswith(inside) if inside else False)
        if reason is not None:
            reasons[path] = reason
    if named and reasons:
        path, reason = next(iter(reasons.items()))
        raise ValueError(
            f"{path or 'the root'} cannot be factorized: {reason}. Leave it out with "
            "where=."
        )
    return reasons


def in_factors(site: Site) -> bool:
    """Whether the weight of a layer is a node."""
    return isinstance(getattr(site.layer, "weight", None), LowRank | SVDForm)


def _refusal(site: Site, tied: set[int], inside: bool) -> str | None:
    name = type(site.layer).__name__
    if site.kind not in ("linear", "conv", "lookup"):
        return "it is an array, and how it is used is not known"
    if inside:
        return "it is inside of a layer that computes another weight out of its own"
    if site.is_quantized:
        return "its weight is quantized"
    if in_factors(site):
        return "its weight is in factors already"
    if type(site.layer) not in _STOCK:
        return f"{name} may do more than multiply by its weight"
    if not eqx.is_array(site.layer.weight) or id(site.layer.weight) in tied:
        return "its weight is tied to another layer"
    try:
        site.check()
    except ValueError as error:
        return str(error).rstrip(".")
    if "scalar" in (getattr(site.layer, n, 0) for n in ("in_features", "out_features")):
        return "it has one input or one output"
    return None


_CONVS = (eqx.nn.Conv, eqx.nn.Conv1d, eqx.nn.Conv2d, eqx.nn.Conv3d)
_STOCK = (eqx.nn.Linear, eqx.nn.Embedding, *_CONVS)


def _tied(model: PyTree) -> set[int]:
    """The arrays that ``eqx.nn.Shared`` hands to a second place."""
    is_shared = lambda x: isinstance(x, eqx.nn.Shared)
    shared = filter(is_shared, jax.tree.leaves(model, is_leaf=is_shared))
    handed = [node.get(node.pytree) for node in shared]
    return {id(x) for x in jax.tree.leaves(handed)}
