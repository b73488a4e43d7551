"""Entrywise products as PEFT keeps them: HiRA, LoHa and IA3."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ....lowrank import LowRank
from ...kinds.structured import Hadamard
from .._config import alpha_of, by_pattern, is_called, number, patterns_of
from .._names import Module
from ._format import Format, misfit
from ._layout import Names, check_convolution, pair_as_stored, read_pair


class Hira(Format):
    """The weight times a product of factors."""

    name = "HIRA"
    names = Names(("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B"))
    suffixes = (*names.linear, *names.embedding)
    settings = ("hira_dropout",)
    dropout = "hira_dropout"
    kinds = ("linear", "conv", "embedding")

    def accepts(self, part):
        """Whether the other factor is the weight itself."""
        own = part.adapter
        return isinstance(own, Hadamard) and own.other is None and own.train == "both"

    def write(self, part):
        """The factors, the scale in the left one: there is none in PEFT."""
        module, own, _ = part
        left = np.asarray(own.scale.astype(own.pair.dtype) * own.pair.left)
        right = np.asarray(own.pair.right)
        return pair_as_stored(module, left, right, self.names), own.pair.rank

    def config(self, facts):
        """The ranks."""
        rank, ranks = patterns_of(facts)
        return {"r": rank, "rank_pattern": ranks}

    def read(self, module, tensors, config):
        """The factors."""
        pair = read_pair(module, tensors, self.names)
        return _hadamard(pair, None, 1.0, self.rate(config))

    def check(self, module):
        """Convolutions without groups and dilation."""
        super().check(module)
        check_convolution(module)


class Loha(Format):
    """Two products of factors."""

    name = "LOHA"
    suffixes = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    settings = ("alpha", "rank_dropout", "module_dropout")
    kinds = ("linear", "conv")

    def accepts(self, part):
        """Whether there are two pairs."""
        return isinstance(part.adapter, Hadamard) and part.adapter.other is not None

    def write(self, part):
        """Both pairs; the kernel of a convolution is flattened in PEFT, too."""
        own = part.adapter
        pairs = (own.pair, own.other)
        tensors = [x for pair in pairs for x in (pair.left, pair.right.T)]
        facts = (own.pair.rank, alpha_of(float(own.scale), own.pair.rank))
        return dict(zip(self.suffixes, tensors, strict=True)), facts

    def config(self, facts):
        """Ranks and the numerators of the scales."""
        rank, ranks = patterns_of({name: rank for name, (rank, _) in facts.items()})
        alpha, alphas = patterns_of({name: alpha for name, (_, alpha) in facts.items()})
        return {"r": rank, "rank_pattern": ranks, "alpha": alpha, "alpha_pattern": alphas}

    def read(self, module, tensors, config):
        """The scale from alpha and the rank of the tensors."""
        if set(tensors) != set(self.suffixes):
            raise ValueError(f"The file has {sorted(tensors)} alone for {module.name!r}.")
        arrays = [tensors[name] for name in self.suffixes]
        rank, (m, n) = arrays[0].shape[-1], module.site.shape
        if [x.shape for x in arrays] != [(m, rank), (rank, n)] * 2 or not rank:
            raise misfit(module, tensors)
        one, other = (
            LowRank(jnp.asarray(left), jnp.asarray(right.T))
            for left, right in (arrays[:2], arrays[2:])
        )
        alpha = by_pattern(config, "alpha_pattern", module.name, number(config, "alpha", 8))
        return _hadamard(one, other, alpha / rank)


class Ia3(Format):
    """A gain for each output, or each input."""

    name = "IA3"
    suffixes = ("ia3_l",)
    settings = ("feedforward_modules", "init_ia3_weights")
    kinds = ("linear", "conv")

    def accepts(self, part):
        """Whether it is a vector of gains, of channels where the layer is a convolution."""
        own = part.adapter
        if not isinstance(own, Hadamard) or own.train == "both":
            return False
        taps = _by_channel(part.module, np.asarray(own.pair.right))
        return own.train == "left" or bool(np.all(taps == taps[:, :1]))

    def write(self, part):
        """One and the change."""
        module, own, _ = part
        of_outputs = own.train == "left"
        right = _by_channel(module, np.asarray(own.pair.right))[:, 0]
        change = np.asarray(own.pair.left)[:, 0] if of_outputs else right
        gains = (1 + np.asarray(own.scale) * change).astype(change.dtype)
        shape = (-1, 1) if of_outputs else (1, -1)
        if module.kernel:
            shape = (1, -1, *(1,) * (len(module.kernel) - 1))
        return {"ia3_l": gains.reshape(shape)}, of_outputs

    def config(self, facts):
        """Which modules have gains of their inputs."""
        of_inputs = [name for name, of_outputs in facts.items() if not of_outputs]
        return {"feedforward_modules": sorted(of_inputs)}

    def read(self, module, tensors, config):
        """Of the outputs or the inputs, as the config says of the module."""
        gains = tensors["ia3_l"]
        inner = config.get("feedforward_modules") or []
        of_outputs = not is_called(module.name, inner)
        m, n = module.site.shape
        channels = len(_by_channel(module, np.zeros(n)))
        if gains.size != (m if of_outputs else channels) or gains.ndim < 2:
            raise misfit(module, tensors)
        change = gains.reshape(-1, 1) - np.asarray(1, gains.dtype)
        if not of_outputs:  # of a convolution one for all taps
            change = np.repeat(change, n // channels, axis=0)
        ones = np.ones((n if of_outputs else m, 1), gains.dtype)
        left, right = (change, ones) if of_outputs else (ones, change)
        pair = LowRank(jnp.asarray(left), jnp.asarray(right))
        return _hadamard(pair, None, 1.0, None, "left" if of_outputs else "right")


def _by_channel(module: Module, vector: np.ndarray) -> np.ndarray:
    """A number for each input of a flattened kernel as ``(channels, taps)``."""
    return vector.reshape(module.kernel[0] if module.kernel else vector.size, -1)


def _hadamard(pair, other, scale, rate=None, train: Any = "both") -> Hadamard:
    return Hadamard(pair, other, jnp.asarray(scale, jnp.float32), rate, train)
