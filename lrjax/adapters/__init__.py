"""Low-rank adapters that live outside the model: build, bind, merge, train."""

from .._sites import (
    AxesOf as AxesOf,
    InputStatistic as InputStatistic,
    LinearSite as LinearSite,
    QuantizedArray as QuantizedArray,
    Site as Site,
    activation_statistics as activation_statistics,
    axes_of as axes_of,
    register_layer as register_layer,
    register_quantized as register_quantized,
)
from . import nnx as nnx, peft as peft, qwix as qwix
from ._pool import (
    BasisPool as BasisPool,
    FactorPool as FactorPool,
    Pool as Pool,
    VectorPool as VectorPool,
)
from .adapt import adapt as adapt
from .as_lora import as_lora as as_lora, change_errors as change_errors
from .bind import (
    bind as bind,
    detach as detach,
    materialize as materialize,
    merge as merge,
)
from .folds import (
    Average as Average,
    Continue as Continue,
    FoldRule as FoldRule,
    KeepMoments as KeepMoments,
    MomentRule as MomentRule,
    PruneMoments as PruneMoments,
    ResetMoments as ResetMoments,
    Restart as Restart,
    RotateMoments as RotateMoments,
    fold as fold,
    merge_heads as merge_heads,
    relora_schedule as relora_schedule,
    rewarm as rewarm,
    start_here as start_here,
)
from .inits_from_data import (
    gradient_statistics as gradient_statistics,
    ranks_by_variance as ranks_by_variance,
)
from .interop import (
    load_gguf_lora as load_gguf_lora,
    load_kohya as load_kohya,
    load_peft as load_peft,
    read_gguf as read_gguf,
    save_gguf_lora as save_gguf_lora,
    save_kohya as save_kohya,
    save_peft as save_peft,
)
from .kinds import (
    BAT as BAT,
    IA3 as IA3,
    NLS as NLS,
    NOLA as NOLA,
    OFT as OFT,
    PMSS as PMSS,
    SODA as SODA,
    AdaLoRA as AdaLoRA,
    Bases as Bases,
    Biased as Biased,
    Block as Block,
    BoRA as BoRA,
    CapaBoost as CapaBoost,
    Combination as Combination,
    Core as Core,
    DoRA as DoRA,
    DoTA as DoTA,
    DyLoRA as DyLoRA,
    EigenLoRAx as EigenLoRAx,
    Factors as Factors,
    FLoRA as FLoRA,
    Full as Full,
    FullCopy as FullCopy,
    Fused as Fused,
    FusedRows as FusedRows,
    GraLoRA as GraLoRA,
    Hadamard as Hadamard,
    HiRA as HiRA,
    IncreLoRA as IncreLoRA,
    Kronecker as Kronecker,
    LoHa as LoHa,
    LoKr as LoKr,
    LoLDU as LoLDU,
    LoRA as LoRA,
    LoRASB as LoRASB,
    LoRAXS as LoRAXS,
    LoTR as LoTR,
    Magnitude as Magnitude,
    MiSS as MiSS,
    NoRA as NoRA,
    PoLAR as PoLAR,
    RandLoRA as RandLoRA,
    Rotation as Rotation,
    Scaled as Scaled,
    ScaledProducts as ScaledProducts,
    Seeded as Seeded,
    SoRA as SoRA,
    StelLA as StelLA,
    Summed as Summed,
    SVFit as SVFit,
    Tensor as Tensor,
    TiedLoRA as TiedLoRA,
    TinyLoRA as TinyLoRA,
    TokenRows as TokenRows,
    Tucker as Tucker,
    VeRA as VeRA,
    Weighted as Weighted,
    WithBias as WithBias,
    WithMagnitude as WithMagnitude,
)
from .kinds.data_starts import (
    GradientStart as GradientStart,
    SpectralStart as SpectralStart,
    StepStart as StepStart,
    VarianceStart as VarianceStart,
    WeightedStart as WeightedStart,
)
from .kinds.starts import (
    OrthogonalStart as OrthogonalStart,
    QRStart as QRStart,
    ScaledStart as ScaledStart,
    SingularStart as SingularStart,
    SmallStart as SmallStart,
    Start as Start,
    ZeroStart as ZeroStart,
)
from .loftq import loftq as loftq
from .many import (
    Arrow as Arrow,
    Gate as Gate,
    GateKind as GateKind,
    LearnedGates as LearnedGates,
    Mixture as Mixture,
    Stack as Stack,
    combine as combine,
    feature_weights as feature_weights,
    federated_round as federated_round,
    mix as mix,
    select as select,
    softmax_weights as softmax_weights,
    stack as stack,
    swap as swap,
)
from .parameterization import (
    FactorSettings as FactorSettings,
    Parameterization as Parameterization,
    equivalent_hyperparameters as equivalent_hyperparameters,
)
from .posterior import (
    IsotropicPosterior as IsotropicPosterior,
    ScaleSearch as ScaleSearch,
    isotropic_posterior as isotropic_posterior,
    search_scale as search_scale,
)
from .protocol import (
    Adapter as Adapter,
    AdapterKind as AdapterKind,
    Ready as Ready,
    is_adapter as is_adapter,
)
from .quantize import (
    NF4 as NF4,
    Int8 as Int8,
    dequantize as dequantize,
    quantize as quantize,
)
from .ranks import (
    PruneRanksState as PruneRanksState,
    ablation_scores as ablation_scores,
    active_ranks as active_ranks,
    change_sensitivity as change_sensitivity,
    drop_ranks as drop_ranks,
    gates as gates,
    grow_ranks as grow_ranks,
    move_ranks as move_ranks,
    orthogonality as orthogonality,
    prune_inputs as prune_inputs,
    prune_ranks as prune_ranks,
    with_ranks as with_ranks,
)
from .robust import (
    adversarial_inputs as adversarial_inputs,
    disentangled_loss as disentangled_loss,
    disentangled_weights as disentangled_weights,
    natural_branch as natural_branch,
)
from .tree import (
    Adapters as Adapters,
    map_adapters as map_adapters,
    partition as partition,
)
from .unmerge import unmerge as unmerge
