"""The losses that the theory of low-rank training is about; data are arguments."""

from .attention import (
    Attention as Attention,
    AttentionTask as AttentionTask,
    attention as attention,
    attention_loss as attention_loss,
    attention_task as attention_task,
)
from .deep_linear import (
    LoraTask as LoraTask,
    TwoLayers as TwoLayers,
    deep_linear_loss as deep_linear_loss,
    deep_lora_loss as deep_lora_loss,
    lora_task as lora_task,
    two_layer_loss as two_layer_loss,
)
from .factorizations import (
    approximation_loss as approximation_loss,
    bures_wasserstein_loss as bures_wasserstein_loss,
    trace_squared_loss as trace_squared_loss,
)
from .kernel_regime import (
    lazy_loss as lazy_loss,
    linearized_loss as linearized_loss,
)
from .linear_student import (
    regression_loss as regression_loss,
    student_loss as student_loss,
)
