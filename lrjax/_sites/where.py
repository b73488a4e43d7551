"""Which sites are adapted: what ``where=`` may be, and what it is by default."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .._matrices import is_head_or_embedding, is_input_first
from .sites import Site


Where = Callable[[str, Any], bool] | str | Sequence[str] | None

_ROUTER = re.compile(r"(.*_)?router(_.*)?")


def _by_default(sites: dict[str, Site], kinds: Sequence[str]) -> dict[str, Site]:
    """Such layers but heads, embeddings and routers; without layers, kernels."""
    layers = any(site.kind not in ("array", "vector") for site in sites.values())

    def wanted(path: str, site: Site) -> bool:
        parts = path.lower().split(".")
        if is_head_or_embedding(path) or any(map(_ROUTER.fullmatch, parts)):
            return False
        if layers:
            return site.kind in kinds and _is_floating(site)
        return site.kind == "array" and is_input_first(path)

    return {path: site for path, site in sites.items() if wanted(path, site)}


def _is_floating(site: Site) -> bool:
    try:
        site.check()
    except ValueError:
        return False
    return True


def _names(path: str) -> tuple[str, ...]:
    """A site is called by its path; a kernel also by that of the layer it belongs to."""
    return (path, path.removesuffix(".kernel")) if is_input_first(path) else (path,)


def _by_names(sites: dict[str, Site], names: Sequence[str]) -> dict[str, Site]:
    found, unknown = {}, []
    for name in names:
        matches = lambda path, name=name: any(
            own == name or own.endswith(f".{name}") for own in _names(path)
        )
        here = {path: site for path, site in sites.items() if matches(path)}
        found |= here
        unknown += [] if here else [name]
    if unknown:
        raise ValueError(
            f"where= names {unknown}, and no layer is called so: a name is a whole path or "
            f"its end after a dot. There are:\n  {describe(sites)}"
        )
    return {path: site for path, site in sites.items() if path in found}


def pick(
    sites: dict[str, Site], where: Where, kinds: Sequence[str] = ("linear",)
) -> dict[str, Site]:
    """The sites that are meant.

    Args:
        sites: all of them.
        where: which; None stands for all of some kinds but heads, embeddings and routers.
        kinds: those kinds.

    Raises:
        ValueError: if there are none, or a name is that of none.
    """
    if not sites:
        raise ValueError(
            "there is nothing to adapt or to factorize: the tree holds no eqx.nn.Linear, "
            "Conv or Embedding and no floating-point array with two axes."
        )
    if where is None:
        picked = _by_default(sites, kinds)
    elif isinstance(where, str):
        full = re.compile(where).fullmatch
        picked = {p: s for p, s in sites.items() if any(map(full, _names(p)))}
    elif callable(where):
        picked = {path: s for path, s in sites.items() if where(path, s.layer)}
    else:
        picked = _by_names(sites, where)
    if not picked:
        raise ValueError(
            f"where= picked nothing. By default every layer of the kinds {list(kinds)} (in "
            "trees of parameters every array named 'kernel') is taken but heads, "
            f"embeddings and routers. There are:\n  {describe(sites)}\nPass where= as a "
            "function of (path, layer), a regular expression for whole paths, or a list of "
            "names."
        )
    return picked


def describe(sites: dict[str, Site]) -> str:
    """Sites in words, one a line: path, class and shape of the weight."""
    names = [f"{path or '(root)'}: {_described(site)}" for path, site in sites.items()]
    more = [f"… and {len(names) - 20} more"] if len(names) > 20 else []
    return "\n  ".join(names[:20] + more)


def _described(site: Site) -> str:
    if site.kind in ("array", "vector"):
        return f"{site.layer.dtype} array {site.layer.shape}"
    weight = getattr(site.layer, "weight", None)
    return f"{type(site.layer).__name__} {getattr(weight, 'shape', '')}".rstrip()
