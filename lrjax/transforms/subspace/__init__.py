"""Transforms that keep their state, or their update, in a low-rank subspace."""

from .accumulate_gradients import (
    AccumulateGradientsState as AccumulateGradientsState,
    accumulate_gradients as accumulate_gradients,
)
from .compress_momentum import (
    CompressMomentumState as CompressMomentumState,
    compress_momentum as compress_momentum,
    data_parallel_specs as data_parallel_specs,
)
from .factored_momentum import (
    FactoredMomentumState as FactoredMomentumState,
    factored_momentum as factored_momentum,
)
from .project_out import ProjectOutState as ProjectOutState, project_out as project_out
from .project_updates import (
    ProjectUpdatesState as ProjectUpdatesState,
    project_updates as project_updates,
)
from .rotate_updates import (
    RotateUpdatesState as RotateUpdatesState,
    Rotation as Rotation,
    rotate_updates as rotate_updates,
)
from .scale_by_low_rank_curvature import (
    ScaleByLowRankCurvatureState as ScaleByLowRankCurvatureState,
    scale_by_low_rank_curvature as scale_by_low_rank_curvature,
)
from .state_specs import state_specs as state_specs
