"""The nodes that hold a matrix in factors, and what can be computed without forming it."""

from .algebra import (
    add as add,
    balance as balance,
    inner as inner,
    norm as norm,
    refactor as refactor,
    svd as svd,
)
from .allocation import (
    energy_ranks as energy_ranks,
    knapsack_ranks as knapsack_ranks,
    minimax_ranks as minimax_ranks,
    parameter_count as parameter_count,
    penalized_ranks as penalized_ranks,
)
from .augmentation import (
    augment as augment,
    brand_update as brand_update,
    lift as lift,
    transport_core as transport_core,
)
from .core_shape import core_shape as core_shape
from .edits import edit_weight as edit_weight
from .inits import (
    balanced_init as balanced_init,
    disjoint_svd_init as disjoint_svd_init,
    gaussian_init as gaussian_init,
    lora_init as lora_init,
    orthogonal_init as orthogonal_init,
    qr_init as qr_init,
    small_init as small_init,
    svd_init as svd_init,
    weighted_svd_init as weighted_svd_init,
)
from .nodes import (
    LowRank as LowRank,
    SVDForm as SVDForm,
    is_low_rank as is_low_rank,
    is_svd_form as is_svd_form,
)
from .prefix import (
    columns_in_use as columns_in_use,
    first_columns as first_columns,
    tail_squares as tail_squares,
)
from .tangent import (
    project_to_tangent as project_to_tangent,
    relative_step as relative_step,
    retraction as retraction,
    transport as transport,
)
from .truncation import (
    clamp_spectrum as clamp_spectrum,
    tail_rank as tail_rank,
    truncate as truncate,
)
from .tucker import (
    TuckerForm as TuckerForm,
    higher_order_svd as higher_order_svd,
    multiply_axes as multiply_axes,
    tucker_augment as tucker_augment,
    tucker_inner as tucker_inner,
    tucker_tangent as tucker_tangent,
    tucker_truncate as tucker_truncate,
    unfold as unfold,
    unfolded_svd as unfolded_svd,
)
