"""What is put around a whole transform: when it runs, how its state is held and placed."""

from .alternate_factors import (
    AlternateFactorsState as AlternateFactorsState,
    alternate_factors as alternate_factors,
)
from .every import EveryState as EveryState, every as every
from .on_matrices import on_matrices as on_matrices
from .on_mesh import on_mesh as on_mesh
from .on_pairs import Pair as Pair, on_pairs as on_pairs, pairs_by_name as pairs_by_name
from .quantize_state import (
    QuantizeStateState as QuantizeStateState,
    quantize_state as quantize_state,
)
from .reduce_at_checkpoints import (
    ReduceAtCheckpointsState as ReduceAtCheckpointsState,
    reduce_at_checkpoints as reduce_at_checkpoints,
)
from .stack_leaves import stack_leaves as stack_leaves
from .state_specs import state_specs as state_specs
from .step_by_layer import (
    StepByLayer as StepByLayer,
    StepByLayerState as StepByLayerState,
    step_by_layer as step_by_layer,
)
from .surrogate_steps import surrogate_steps as surrogate_steps
