"""Blocks that are repeated, or that map those of the weight, as PEFT keeps them."""

import jax.numpy as jnp
import numpy as np

from ...kinds.structured import Affine, Block, Repeated
from .._config import one_value
from ._format import Format, misfit


class Miss(Format):
    """MiSS, and BAT, which PEFT calls by the init."""

    name = "MISS"
    suffixes = ("miss_block",)
    settings = ("mini_r", "miss_dropout")
    dropout = "miss_dropout"

    def accepts(self, part):
        """Whether it is one of both, of no more columns than inputs."""
        own = part.adapter
        if not isinstance(own, Block) or own.form not in (Repeated, Affine):
            return False
        return own.blocks.shape[-1] <= own.sides[1]

    def write(self, part):
        """The block, transposed, or the blocks."""
        blocks, is_map = part.adapter.blocks, part.adapter.form is Affine
        return {"miss_block": blocks if is_map else blocks.T}, (blocks.shape[-1], is_map)

    def config(self, facts):
        """One width and one form for all."""
        fix = "save each group by itself."
        is_map = one_value("form", [is_map for _, is_map in facts.values()], fix)
        return {
            "r": one_value("rank", [rank for rank, _ in facts.values()], fix),
            "init_weights": "bat" if is_map else True,
        }

    def read(self, module, tensors, config):
        """What the init of the config says that it is."""
        block, (m, n), init = (
            tensors["miss_block"],
            module.site.shape,
            config.get("init_weights"),
        )
        rank = block.shape[-1] if init == "bat" else len(block)
        if init == "bat":
            fits = block.shape == (m // rank, rank, rank) and not (m % rank or n % rank)
        else:
            fits = block.ndim == 2 and rank <= n and block.size and m % block.shape[1] == 0
        if not fits or (block.shape[1] != m and init not in ("bat", "mini")):
            raise misfit(module, tensors)
        if init != "bat":  # "mini" repeats it along the outputs as well
            block = np.tile(block, (1, m // block.shape[1])).T
        return Block(
            jnp.asarray(block),
            None,
            self.rate(config),
            module.site.shape,
            Affine if init == "bat" else Repeated,
        )
