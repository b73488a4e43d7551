"""What is known exactly: solutions of flows, limits, errors and optima."""

from .aligned_modes import (
    aligned_modes as aligned_modes,
    half_learning_times as half_learning_times,
    scaled_modes as scaled_modes,
    spectral_modes as spectral_modes,
    tangent_modes as tangent_modes,
)
from .bures_wasserstein import (
    bures_wasserstein_flow as bures_wasserstein_flow,
    bures_wasserstein_limit as bures_wasserstein_limit,
)
from .deep_lora import (
    deep_lora_floor as deep_lora_floor,
    deep_lora_optimum as deep_lora_optimum,
)
from .factorizations import (
    RiccatiBlocks as RiccatiBlocks,
    end_to_end_velocity as end_to_end_velocity,
    riccati as riccati,
    trace_squared as trace_squared,
)
from .forgetting import (
    Forgetting as Forgetting,
    forgetting_by_rank as forgetting_by_rank,
    forgetting_in_time as forgetting_in_time,
)
from .frozen_factors import (
    FrozenErrors as FrozenErrors,
    best_left as best_left,
    best_right as best_right,
    frozen_factor_errors as frozen_factor_errors,
)
from .gradual_stages import Stages as Stages, gradual_stages as gradual_stages
from .kernel_flow import kernel_flow as kernel_flow
from .linear_student import (
    MarchenkoPastur as MarchenkoPastur,
    best_stopping_time as best_stopping_time,
    linear_student as linear_student,
    marchenko_pastur as marchenko_pastur,
    student_error as student_error,
)
