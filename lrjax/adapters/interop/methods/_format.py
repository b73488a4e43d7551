"""What one method of PEFT has to say of itself, to be read and written."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ...protocol import Adapter, FactorPool
from .._config import number
from .._names import Module
from .._tensors import Tensors


class Part(NamedTuple):
    """One matrix of a model, by its name, with its adapter and the pool of that."""

    module: Module
    adapter: Any  # an Adapter; each format knows its own
    pool: Any


class Format(abc.ABC):
    """The file of one ``peft_type``: names of tensors and settings, for one module each.

    Attributes:
        name: the ``peft_type``.
        suffixes: how the names of its tensors end, after that of the module.
        shared: names of tensors that belong to no module.
        settings: those in its config that others do not have.
        dropout: what the config calls the rate, where inputs are dropped at all.
        kinds: of modules that PEFT adapts so, all if there is none.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    dropout: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    @abc.abstractmethod
    def accepts(self, part: Part) -> bool:
        """Whether the adapter can be written so, exactly."""

    @abc.abstractmethod
    def write(self, part: Part) -> tuple[dict[str, Any], Any]:
        """The tensors of one module by suffix, and what the config has to say of it."""

    @abc.abstractmethod
    def config(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, from what ``write`` gave for each module."""

    @abc.abstractmethod
    def read(
        self, module: Module, tensors: dict[str, np.ndarray], config: Mapping[str, Any]
    ) -> Adapter:
        """The adapter of one module."""

    def rate(self, config: Mapping[str, Any]) -> Array | None:
        """The rate of dropout that the config tells."""
        rate = 0 if self.dropout is None else number(config, self.dropout, 0)
        return jnp.asarray(rate, jnp.float32) if rate else None

    def write_shared(self, parts: list[Part]) -> dict[str, np.ndarray]:
        """The tensors that belong to no module."""
        del parts
        return {}

    def read_pools(
        self,
        file: Tensors,
        modules: list[Module],
        adapters: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> dict[str, FactorPool]:
        """The pools of the adapters that :meth:`read` gave."""
        del file, modules, adapters, config
        return {}

    def check(self, module: Module) -> None:
        """Refuse a weight that PEFT does not adapt so."""
        if self.kinds and module.kind not in self.kinds:
            raise ValueError(
                f"{module.site.path!r} is of kind {module.kind!r}, and PEFT's {self.name} "
                f"takes {list(self.kinds)}: leave it out, or merge it with lrjax.merge."
            )


def misfit(module: Module, tensors: Mapping[str, np.ndarray]) -> ValueError:
    """The error of shapes that do not belong together."""
    shapes = {name: x.shape for name, x in tensors.items()}
    kernel = f", kernel {module.kernel}" if module.kernel else ""
    return ValueError(
        f"The tensors {shapes} of {module.name!r} do not fit the weight at "
        f"{module.site.path!r}, (outputs, inputs) = {module.site.shape}{kernel}: they are "
        "of another model, or rename= or axes= tell it wrongly."
    )
