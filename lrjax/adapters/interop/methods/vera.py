"""VeRA as PEFT keeps it: one projection for all modules, perhaps only its seed."""

import math

import jax.numpy as jnp
import numpy as np

from ....lowrank import LowRank
from ...kinds.coefficients import Scaled
from ...protocol import FactorPool
from .._config import number, one_value
from ._format import Format, misfit


GROUP = "VeRA"


class Vera(Format):
    """Scalings of a frozen pool."""

    name = "VERA"
    suffixes = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    settings = ("projection_prng_key", "save_projection", "d_initial", "vera_dropout")
    dropout = "vera_dropout"

    def accepts(self, part):
        """Whether it scales a pool that is not trained."""
        _, adapter, pool = part
        is_frozen = (
            isinstance(adapter, Scaled) and pool is not None and pool.train == "none"
        )
        return is_frozen and bool(np.all(np.asarray(adapter.scale) == 1))

    def write(self, part):
        """Both vectors."""
        _, adapter, _ = part
        vectors = (np.asarray(adapter.outputs), np.asarray(adapter.ranks))
        return dict(zip(self.suffixes, vectors, strict=True)), len(adapter.ranks)

    def config(self, facts):
        """The rank; the projection is in the file."""
        return {
            "r": one_value("rank", facts.values(), "save each group by itself."),
            "projection_prng_key": 0,
            "save_projection": True,
            "init_weights": True,
        }

    def write_shared(self, parts):
        """The rows of the pool that the largest modules use."""
        fix = "save the adapters of each group by themselves."
        one_value("projection", [part.adapter.group for part in parts], fix)
        m, n = (max(part.module.site.shape[k] for part in parts) for k in (0, 1))
        pair = parts[0].pool.pair
        return {
            "vera_A": np.asarray(pair.right[:n]).T,
            "vera_B": np.asarray(pair.left[:m]),
        }

    def read(self, module, tensors, config):
        """The vectors of one module."""
        if set(tensors) != set(self.suffixes):
            raise ValueError(f"The file has {sorted(tensors)} alone for {module.name!r}.")
        outputs, ranks = (tensors[name] for name in self.suffixes)
        if outputs.shape != (module.site.shape[0],) or ranks.ndim != 1:
            raise misfit(module, tensors)
        return Scaled(
            jnp.asarray(outputs),
            jnp.asarray(ranks),
            jnp.ones((), jnp.float32),
            self.rate(config),
            module.site.shape[1],
            GROUP,
        )

    def read_pools(self, file, modules, adapters, config):
        """The projection of the file, or that of its seed."""
        ranks = [len(adapter.ranks) for adapter in adapters.values()]
        rank = one_value("rank", ranks, "the file is broken.")
        m, n = (max(module.site.shape[k] for module in modules) for k in (0, 1))
        names = {name.rpartition(".")[2]: name for name in file.shapes}
        if "vera_A" in names and "vera_B" in names:
            a, b = (file.read(names[name]) for name in self.shared)
        else:
            a, b = projection(int(number(config, "projection_prng_key", 0)), rank, m, n)
        if a.ndim != 2 or len(a) != rank or a.shape[1] < n or b.shape[1:] != (rank,):
            raise ValueError(
                f"vera_A {a.shape} and vera_B {b.shape} do not fit vectors of rank {rank} "
                f"and a largest module of {n} inputs and {m} outputs."
            )
        if len(b) < m:
            raise ValueError(f"vera_B {b.shape} has less rows than a module outputs, {m}.")
        return {GROUP: FactorPool(LowRank(jnp.asarray(b), jnp.asarray(a.T)), "none")}


def projection(seed: int, rank: int, outputs: int, inputs: int):
    """``A (r, inputs)`` and ``B (outputs, r)`` as torch draws them from a seed, to 6e-8.

    Kaiming uniform, ``±√6/√fan_in``, of the low 24 bits of the words of a Mersenne
    twister; first A, then B from where it stopped.
    """
    twister = np.random.RandomState(seed)

    def drawn(shape: tuple[int, int]) -> np.ndarray:
        words = twister.randint(0, 2**32, size=shape, dtype=np.uint32)
        bound = np.float32(math.sqrt(6 / shape[1]))
        unit = (words & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)
        return unit * (bound - -bound) - bound

    return drawn((rank, inputs)), drawn((outputs, rank))
