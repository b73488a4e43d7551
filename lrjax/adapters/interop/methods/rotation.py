"""OFT as PEFT keeps it: the angles of rotations of blocks of the inputs."""

import jax.numpy as jnp

from ...kinds.structured import Rotation
from .._config import number, one_value
from ._format import Format, misfit


class Oft(Format):
    """Rotations of the inputs."""

    name = "OFT"
    suffixes = ("oft_R.weight",)
    settings = (
        *("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"),
        *("eps", "module_dropout"),
    )

    def accepts(self, part):
        """Whether it is the inputs that turn, and no more is done."""
        own = part.adapter
        turns = isinstance(own, Rotation) and not own.of_outputs
        return turns and own.spectrum is None

    def write(self, part):
        """The angles; PEFT's exact rotations turn the other way than its series does."""
        own = part.adapter
        angles = own.angles if own.terms is not None else -own.angles
        size = own.sides[1] // own.angles.shape[-2]
        return {"oft_R.weight": angles}, (size, own.terms)

    def config(self, facts):
        """One size of blocks and one way to make rotations."""
        fix = "save each group by itself."
        size = one_value("size of blocks", [size for size, _ in facts.values()], fix)
        terms = one_value("number of terms", [t or 0 for _, t in facts.values()], fix)
        return {
            "oft_block_size": size,
            "r": 0,
            "use_cayley_neumann": terms > 0,
            "num_cayley_neumann_terms": terms or 5,
        }

    def read(self, module, tensors, config):
        """As many blocks as there are rows of angles."""
        angles, (m, n) = tensors["oft_R.weight"], module.site.shape
        size = n // max(len(angles), 1)
        if angles.shape != (n // size, size * (size - 1) // 2) or n % size:
            raise misfit(module, tensors)
        has_series = config.get("use_cayley_neumann", True)
        terms = int(number(config, "num_cayley_neumann_terms", 5)) if has_series else None
        angles = jnp.asarray(angles if has_series else -angles)
        return Rotation(angles, None, (m, n), False, terms)
