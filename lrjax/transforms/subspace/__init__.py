"""Transforms that keep their state, or their update, in a low-rank subspace."""

from .compress_momentum import (
    CompressMomentumState as CompressMomentumState,
    compress_momentum as compress_momentum,
    data_parallel_specs as data_parallel_specs,
)
from .project_updates import (
    ProjectUpdatesState as ProjectUpdatesState,
    project_updates as project_updates,
)
from .rotate_updates import (
    RotateUpdatesState as RotateUpdatesState,
    Rotation as Rotation,
    rotate_updates as rotate_updates,
)
