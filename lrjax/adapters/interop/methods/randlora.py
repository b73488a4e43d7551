"""RandLoRA as PEFT keeps it: the diagonals of each module, one set of bases for all."""

import jax.numpy as jnp
import numpy as np

from ...kinds.coefficients import Bases
from ...protocol import BasisPool
from .._config import alpha_of, number, one_value
from ._format import Format, misfit


GROUP = "RandLoRA"


class RandLora(Format):
    """Scalings of frozen bases."""

    name = "RANDLORA"
    suffixes = ("randlora_lambda", "randlora_gamma")
    shared = ("randlora_A", "randlora_B")
    settings = (
        *("projection_prng_key", "save_projection", "randlora_alpha", "randlora_dropout"),
        *("sparse", "very_sparse"),
    )
    dropout = "randlora_dropout"

    def accepts(self, part):
        """Whether it scales bases."""
        return isinstance(part.adapter, Bases)

    def write(self, part):
        """The diagonals of ranks with a column for each base, and those of the gains."""
        own = part.adapter
        rank = own.ranks.shape[-1]
        tensors = dict(zip(self.suffixes, (own.ranks.T, own.gains), strict=True))
        return tensors, (rank, alpha_of(float(own.scale), rank))

    def config(self, facts):
        """One rank and one scale; the bases are in the file."""
        fix = "save each group by itself."
        return {
            "r": one_value("rank", [rank for rank, _ in facts.values()], fix),
            "randlora_alpha": one_value("alpha", [a for _, a in facts.values()], fix),
            "projection_prng_key": 0,
            "save_projection": True,
            "init_weights": True,
        }

    def write_shared(self, parts):
        """The bases for the longest output and input; what no module uses is zero."""
        fix = "save the adapters of each group by themselves."
        one_value("set of bases", [part.adapter.group for part in parts], fix)
        sides = (max(part.module.site.shape[k] for part in parts) for k in (0, 1))
        (small, large), rank = sorted(sides), parts[0].adapter.ranks.shape[-1]
        count = -(-small // rank)
        wide = _fitted(parts[0].pool.wide, (large, count * rank))
        narrow = _fitted(parts[0].pool.narrow, (small, rank))
        a, b = narrow.T[:, None, :], wide.reshape(large, count, rank)
        return dict(zip(self.shared, (a, b), strict=True))

    def read(self, module, tensors, config):
        """The diagonals of one module."""
        if set(tensors) != set(self.suffixes):
            raise ValueError(f"The file has {sorted(tensors)} alone for {module.name!r}.")
        ranks, gains = (tensors[name] for name in self.suffixes)
        small = min(module.site.shape)
        if ranks.ndim != 2 or 0 in ranks.shape:
            raise misfit(module, tensors)
        rank, count = ranks.shape
        if count != -(-small // rank) or gains.shape != (count, small):
            raise misfit(module, tensors)
        scale = jnp.asarray(number(config, "randlora_alpha", 640) / rank, jnp.float32)
        diagonals = jnp.asarray(ranks.T), jnp.asarray(gains)
        return Bases(*diagonals, scale, self.rate(config), module.site.shape, GROUP)

    def read_pools(self, file, modules, adapters, config):
        """The bases of the file."""
        # PEFT writes the one pair again for every module, under longer names.
        longest_first = sorted(file.shapes, key=len, reverse=True)
        names = {name.rpartition(".")[2]: name for name in longest_first}
        if not set(self.shared) <= set(names):
            raise ValueError(
                "The file has no randlora_A and randlora_B, and which ones their seed "
                "stands for only PEFT knows: save it there with save_projection=True."
            )
        a, b = (file.read(names[name]) for name in self.shared)
        ranks = [own.ranks.shape[-1] for own in adapters.values()]
        rank = one_value("rank", ranks, "the file is broken.")
        small, large = (
            max(side(module.site.shape) for module in modules) for side in (min, max)
        )
        least = (rank, 1, small), (large, -(-small // rank), rank)
        fits = a.shape[:2] == (rank, 1) and a.ndim == b.ndim == 3 and b.shape[2] == rank
        if not fits or a.shape[2] < small or min(np.subtract(b.shape, least[1])) < 0:
            raise ValueError(
                f"randlora_A {a.shape} and randlora_B {b.shape} are not of the shapes that "
                f"the modules need, {least[0]} and {least[1]} or longer ones."
            )
        wide, narrow = b.reshape(len(b), -1), a[:, 0].T
        return {GROUP: BasisPool(jnp.asarray(wide), jnp.asarray(narrow))}


def _fitted(x, shape: tuple[int, int]) -> np.ndarray:
    """The first rows and columns, and zeros where there are not as many."""
    x = np.asarray(x)[: shape[0], : shape[1]]
    return np.pad(x, [(0, size - own) for size, own in zip(shape, x.shape, strict=True)])
