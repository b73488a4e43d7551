"""Descend on a problem: where it starts, the loop, and what to look at in each step."""

from .observe import (
    Spectrum as Spectrum,
    Staircase as Staircase,
    plot_success as plot_success,
    spectrum as spectrum,
    staircase as staircase,
    success_rate as success_rate,
)
from .solve import (
    History as History,
    Observer as Observer,
    Solution as Solution,
    SolveState as SolveState,
    scan_until_stopped as scan_until_stopped,
    solve as solve,
)
from .spectral_init import spectral_init as spectral_init
