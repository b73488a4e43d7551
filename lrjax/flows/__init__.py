"""Gradient flow: the continuous-time limit of training, and what is known of it exactly."""

from ._field import FlowState as FlowState
from .closed_forms import (
    RiccatiBlocks as RiccatiBlocks,
    aligned_modes as aligned_modes,
    end_to_end_velocity as end_to_end_velocity,
    half_learning_times as half_learning_times,
    riccati as riccati,
    scaled_modes as scaled_modes,
    spectral_modes as spectral_modes,
    tangent_modes as tangent_modes,
    trace_squared as trace_squared,
)
from .gradient_flow import (
    FlowSolution as FlowSolution,
    FlowStats as FlowStats,
    gradient_flow as gradient_flow,
)
from .problems import (
    LoraTask as LoraTask,
    TwoLayers as TwoLayers,
    approximation_loss as approximation_loss,
    deep_linear_loss as deep_linear_loss,
    linearized_loss as linearized_loss,
    lora_task as lora_task,
    trace_squared_loss as trace_squared_loss,
    two_layer_loss as two_layer_loss,
)
from .until import (
    gradient_below as gradient_below,
    loss_below as loss_below,
    stationary as stationary,
)
