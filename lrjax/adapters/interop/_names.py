"""What the matrices of a model are called by libraries that keep them one by one."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Array

from ..._sites import Site


Rename = Callable[[str], str | Sequence[str]]

_ARRAYS = (".weight", ".kernel", ".embedding")
_REPEATED = re.compile(r"(.*_)?(layers?|blocks?|h)")
_EMBEDDING = re.compile(r".*embed.*|(.*_)?(emb|wte|wpe)")


@dataclasses.dataclass(frozen=True)
class Module:
    """One matrix of a model, or the experts of one parameter, by its name elsewhere.

    Attributes:
        name: as ``"model.layers.0.self_attn.q_proj"``.
        site: where it is in the model, the whole stack.
        index: which of the stack it is.
    """

    name: str
    site: Site
    index: tuple[int, ...] = ()

    @property
    def experts(self) -> int | None:
        """How many matrices the parameter holds, if they have no names of their own."""
        rest = self.site.stack[len(self.index) :]
        return rest[0] if rest else None

    def matrix(self) -> np.ndarray:
        """Its matrix, or those of its experts, in the dtype of the weight."""
        return np.asarray(self.site.matrix()[self.index])

    def read(self) -> Array:
        """The same in float32 or higher."""
        return self.site.read()[self.index]

    @property
    def is_embedding(self) -> bool:
        """Whether it is a table that tokens look up."""
        if self.site.kind == "array":
            parts = self.site.path.removesuffix(".weight").split(".")
            return _EMBEDDING.fullmatch(parts[-1].lower()) is not None
        return self.site.kind == "lookup"

    @property
    def kind(self) -> str:
        """What it is in torch: linear, conv, embedding or experts."""
        if self.experts:
            return "experts"
        if self.is_embedding:
            return "embedding"
        return "conv" if self.kernel else "linear"

    @property
    def is_transposed(self) -> bool:
        """Whether the table is kept ``(vocabulary, size)`` and seen so, too."""
        return self.site.kind == "array" and getattr(self.site, "told", None) is None

    @property
    def kernel(self) -> tuple[int, ...] | None:
        """The axes of the inputs of a convolution."""
        if self.site.kind == "conv":
            layer = self.site.layer
            return tuple(layer.weight.shape[-layer.num_spatial_dims - 1 :])
        told = getattr(self.site, "told", None)
        if told is None or len(told.cols) < 3:
            return None
        return tuple(self.site.layer.shape[axis] for axis in told.cols)

    @property
    def parameters(self) -> dict[str, str]:
        """The names of its own arrays: ``{"…q_proj.weight": "weight", …}``."""
        if self.site.kind not in ("array", "vector"):
            keys = {f"{self.name}.weight": "weight"}
            has_bias = self.site.bias is not None
            return keys | ({f"{self.name}.bias": "bias"} if has_bias else {})
        bare = bare_path(self.site) != self.site.path
        return {f"{self.name}.weight" if bare else self.name: "weight"}


def bare_path(site: Site) -> str:
    """The path without the name of the array, where it says no more than that it is one."""
    if site.kind != "array":
        return site.path
    for name in _ARRAYS:
        if site.path.endswith(name):
            return site.path.removesuffix(name)
    return site.path


def modules_of(site: Site, rename: Rename | None) -> list[Module]:
    """The matrices of a site by name.

    Raises:
        ValueError: for a stack that has no names.
    """
    path = bare_path(site)
    name = path if rename is None else rename(path)
    if not isinstance(name, str):
        return _listed(site, list(name))
    if "{}" not in name:
        name = _with_places(name, len(site.stack))
    places = name.count("{}")
    rest = site.stack[places:]
    if places > len(site.stack) or len(rest) > 1 or (rest and site.kind != "array"):
        raise ValueError(
            f"{site.path or 'the root'} is a stack of {site.stack} matrices, and what each "
            f"is called is not told by {name!r}: pass rename=lambda path: … with a name "
            "that has {} in the place of each number, as 'model.layers.{}.mlp.up_proj', or "
            "a list of names."
        )
    return [
        Module(_numbered(name, index), site, index)
        for index in np.ndindex(site.stack[:places])
    ]


def _listed(site: Site, names: list[str]) -> list[Module]:
    indices = list(np.ndindex(site.stack))
    if len(names) != len(indices):
        raise ValueError(
            f"rename= answered with {len(names)} names for {site.path!r}, a stack of "
            f"{site.stack}: it takes one for each matrix."
        )
    pairs = zip(names, indices, strict=True)
    return [Module(name, site, index) for name, index in pairs]


def _with_places(name: str, stack: int) -> str:
    """``layers.{}.q_proj`` from ``layers.q_proj``, where the layers are stacked."""
    parts, found = name.split("."), []
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        found.append(part)
        if stack and _REPEATED.fullmatch(part) and not after.isdigit():
            found.append("{}")
            stack -= 1
    return ".".join(found)


def _numbered(name: str, index: tuple[int, ...]) -> str:
    for number in index:
        name = name.replace("{}", str(number), 1)
    return name


def find_modules(
    sites: Iterable[Site], rename: Rename | None
) -> tuple[dict[str, Module], list[str]]:
    """All matrices of a model by name, and the paths of stacks that have none.

    Raises:
        ValueError: if two have one name.
    """
    found, nameless = {}, []
    for site in sites:
        try:
            modules = modules_of(site, rename)
        except ValueError:
            nameless.append(site.path)
            continue
        for module in modules:
            if module.name in found:
                raise ValueError(
                    f"{found[module.name].site.path!r} and {site.path!r} are both called "
                    f"{module.name!r}: rename= has to tell them apart."
                )
            found[module.name] = module
    return found, nameless


def expert_keys(
    modules: Iterable[Module],
    fits: Callable[[Module, str], bool] = lambda module, place: True,
) -> dict[str, str]:
    """Where the parameters of experts are, by name: wrapped one around the other.

    PEFT wraps the parameters of one module in the order in which its class makes them:
    the first one ends up innermost, ``….experts.base_layer``. That order is not known
    here: it is the first in which the shapes fit, a ``down`` projection being the last.
    """
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.name.rpartition(".")[0], []).append(module)
    keys = {}
    for parent, own in groups.items():
        own.sort(key=lambda module: "down" in module.name.rpartition(".")[2])
        places = [parent + ".base_layer" * depth for depth in reversed(range(len(own)))]
        for order in itertools.permutations(own):
            if all(map(fits, order, places)):
                keys |= {m.name: p for m, p in zip(order, places, strict=True)}
                break
    return keys
