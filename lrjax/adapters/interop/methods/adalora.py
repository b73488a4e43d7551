"""AdaLoRA as PEFT keeps it: triplets, without those that were pruned."""

import jax.numpy as jnp
import numpy as np

from ....lowrank import LowRank
from ...kinds.factors import Factors
from .._config import number, one_value
from ._format import Format, misfit


_TINY = 1e-5  # beside the rank in the denominator of the scale


class AdaLora(Format):
    """Factors with a gate."""

    name = "ADALORA"
    suffixes = ("lora_A", "lora_B", "lora_E")
    settings = (
        *("lora_dropout", "init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT"),
        *("beta1", "beta2", "orth_reg_weight"),
    )
    dropout = "lora_dropout"
    kinds = ("linear", "conv")

    def accepts(self, part):
        """Whether there is a gate, and nothing else beside the factors."""
        own = part.adapter
        if not isinstance(own, Factors) or own.gate is None:
            return False
        return own.mask is None and own.start is None and own.thinning is None

    def write(self, part):
        """The triplets."""
        own = part.adapter
        tensors = (own.pair.right.T, own.pair.left, own.gate[:, None])
        facts = (own.pair.rank, float(own.scale))
        return dict(zip(self.suffixes, tensors, strict=True)), facts

    def config(self, facts):
        """As if all had started with the largest rank, and some of them were pruned."""
        start = max(rank for rank, _ in facts.values())
        fix = "write them as plain LoRA, lrjax.adapters.as_lora."
        scale = one_value("scale", [scale for _, scale in facts.values()], fix)
        pruned = {
            f"{name}.lora_E": [k < rank for k in range(start)]
            for name, (rank, _) in facts.items()
            if rank < start
        }
        return {
            "init_r": start,
            "target_r": start,
            "lora_alpha": _alpha_of(scale, start),
            "rank_pattern": pruned or None,
            "total_step": 1,  # PEFT asks for one
        }

    def read(self, module, tensors, config):
        """The scale is that of the rank at the start, whatever was pruned."""
        if set(tensors) != set(self.suffixes):
            raise ValueError(f"The file has {sorted(tensors)} alone for {module.name!r}.")
        a, b, values = (tensors[name] for name in self.suffixes)
        rank, (m, n) = len(a), module.site.shape
        if (a.shape, b.shape, values.shape) != ((rank, n), (m, rank), (rank, 1)):
            raise misfit(module, tensors)
        if not rank:  # all of it pruned: one triplet of zeros
            a, b, values = np.zeros((1, n)), np.zeros((m, 1)), np.zeros((1, 1))
        start = number(config, "init_r", 12)
        alpha = number(config, "lora_alpha", 8)
        scale = (alpha if alpha > 0 else start) / (start + _TINY)
        return Factors(
            LowRank(jnp.asarray(b), jnp.asarray(a.T)),
            None,
            jnp.asarray(scale, jnp.float32),
            self.rate(config),
            "both",
            gate=jnp.asarray(values[:, 0]),
        )


def _alpha_of(scale: int | float, start: int) -> int | float:
    alpha = scale * (start + _TINY)
    whole = round(alpha)
    same = np.float32(whole / (start + _TINY)) == np.float32(scale)
    return whole if same else alpha
