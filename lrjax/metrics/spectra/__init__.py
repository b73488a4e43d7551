"""Ranks of weights and codes, exact, effective and in time, and directions that are new."""

from .intruders import intruder_dimensions as intruder_dimensions
from .latent_volume import latent_volume as latent_volume
from .local_rank import local_rank as local_rank
from .rank import (
    effective_rank as effective_rank,
    energy_rank as energy_rank,
    nuclear_rank as nuclear_rank,
    numerical_rank as numerical_rank,
    participation_ratio as participation_ratio,
    singular_values as singular_values,
    stable_rank as stable_rank,
)
from .settled_ranks import SettledRanks as SettledRanks
