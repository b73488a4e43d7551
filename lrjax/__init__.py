"""Low-rank learning for JAX."""

from importlib.metadata import version as _version

from . import (
    adapters as adapters,
    flows as flows,
    linalg as linalg,
    metrics as metrics,
    subspaces as subspaces,
)
from .adapters import (
    LoRA as LoRA,
    adapt as adapt,
    bind as bind,
    detach as detach,
    materialize as materialize,
    merge as merge,
    partition as partition,
)
from .flows import FlowSolution as FlowSolution, gradient_flow as gradient_flow
from .lowrank import (
    LowRank as LowRank,
    SVDForm as SVDForm,
    add as add,
    balance as balance,
    inner as inner,
    is_low_rank as is_low_rank,
    norm as norm,
    refactor as refactor,
    svd as svd,
    truncate as truncate,
)
from .recipes import (
    adam_sn as adam_sn,
    apollo as apollo,
    coap as coap,
    dion as dion,
    fira as fira,
    flora as flora,
    frugal as frugal,
    galore as galore,
    galore_plus as galore_plus,
    golore as golore,
    grass as grass,
    ldadam as ldadam,
    levenberg_marquardt as levenberg_marquardt,
    mofasgd as mofasgd,
    online_subspace_descent as online_subspace_descent,
    opsa as opsa,
    power_sgd as power_sgd,
    prec_gd as prec_gd,
    q_galore as q_galore,
    sara as sara,
    scaled_gd as scaled_gd,
    scaled_subgradient as scaled_subgradient,
    snsm as snsm,
    soap as soap,
    subgm as subgm,
    subspace_adam as subspace_adam,
    subtrack as subtrack,
    sumo as sumo,
)
from .recovery import (
    Problem as Problem,
    Solution as Solution,
    fit_robust_pca as fit_robust_pca,
    matrix_completion as matrix_completion,
    matrix_sensing as matrix_sensing,
    phase_retrieval as phase_retrieval,
    robust_pca as robust_pca,
    solve as solve,
    spectral_init as spectral_init,
)
from .sweep import sweep as sweep
from .transforms import (
    Pair as Pair,
    accumulate_gradients as accumulate_gradients,
    add_nuclear_norm as add_nuclear_norm,
    amplify_slow as amplify_slow,
    compress_momentum as compress_momentum,
    data_parallel_specs as data_parallel_specs,
    factored_momentum as factored_momentum,
    every as every,
    limit_norm_growth as limit_norm_growth,
    on_pairs as on_pairs,
    orthogonalize_updates as orthogonalize_updates,
    pairs_by_name as pairs_by_name,
    project_out as project_out,
    project_updates as project_updates,
    quantize_state as quantize_state,
    rebalance as rebalance,
    rotate_updates as rotate_updates,
    scale_by_gauss_newton as scale_by_gauss_newton,
    scale_by_gram as scale_by_gram,
    scale_by_layer_trust as scale_by_layer_trust,
    scale_by_level as scale_by_level,
    scale_by_lion_k as scale_by_lion_k,
    scale_by_polyak as scale_by_polyak,
    scale_by_smooth_polar as scale_by_smooth_polar,
    scale_by_subset_norm as scale_by_subset_norm,
    scale_by_tangent as scale_by_tangent,
    scale_factors as scale_factors,
    unit_norm as unit_norm,
)


__version__ = _version("lrjax")
