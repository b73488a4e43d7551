"""Numbers that say how a low-rank model is doing."""

from .alignment import misalignment as misalignment
from .balance import (
    balance_drift as balance_drift,
    imbalance as imbalance,
    relative_imbalance as relative_imbalance,
)
from .calibration import (
    ReliabilityBins as ReliabilityBins,
    TemperatureFit as TemperatureFit,
    brier_score as brier_score,
    expected_calibration_error as expected_calibration_error,
    fit_temperature as fit_temperature,
    negative_log_likelihood as negative_log_likelihood,
    reliability_bins as reliability_bins,
)
from .forgetting import (
    ContinualScores as ContinualScores,
    continual_scores as continual_scores,
)
from .gradients import (
    GradientCoherence as GradientCoherence,
    HessianOverlap as HessianOverlap,
    HessianSpace as HessianSpace,
    KernelChange as KernelChange,
    diagonal_fisher as diagonal_fisher,
    gradient_coherence as gradient_coherence,
    hessian_overlap as hessian_overlap,
    hessian_space as hessian_space,
    kernel_alignment as kernel_alignment,
    kernel_change as kernel_change,
    relative_change as relative_change,
    tangent_kernel as tangent_kernel,
)
from .memory_report import (
    LeafMemory as LeafMemory,
    MemoryReport as MemoryReport,
    memory_report as memory_report,
)
from .phases import (
    PhaseTimes as PhaseTimes,
    crossing_time as crossing_time,
    fitted_rate as fitted_rate,
    phase_times as phase_times,
)
from .spectra import (
    SettledRanks as SettledRanks,
    effective_rank as effective_rank,
    energy_rank as energy_rank,
    intruder_dimensions as intruder_dimensions,
    latent_volume as latent_volume,
    local_rank as local_rank,
    nuclear_rank as nuclear_rank,
    numerical_rank as numerical_rank,
    participation_ratio as participation_ratio,
    singular_values as singular_values,
    stable_rank as stable_rank,
)
