"""The weights of a model as matrices: where they are, and what their layers do."""

from .arrays import ArraySite as ArraySite, Axes as Axes, array_site as array_site
from .axes_of import AxesOf as AxesOf, axes_of as axes_of
from .find import (
    check_used_once as check_used_once,
    find_sites as find_sites,
    fold_in_path as fold_in_path,
)
from .held import Held as Held
from .layers import (
    ConvSite as ConvSite,
    LinearSite as LinearSite,
    LookupSite as LookupSite,
)
from .quantized import (
    Levels as Levels,
    QuantizedArray as QuantizedArray,
    dense_array as dense_array,
    encoded as encoded,
    holds_quantized as holds_quantized,
    in_blocks as in_blocks,
    is_quantized as is_quantized,
    register_quantized as register_quantized,
)
from .refusals import in_factors as in_factors, refusals as refusals
from .sites import (
    Site as Site,
    check_reweighted as check_reweighted,
    check_unique as check_unique,
    flat_leaves as flat_leaves,
    in_turn as in_turn,
    is_layer as is_layer,
    layer_site as layer_site,
    over_stack as over_stack,
    register_layer as register_layer,
    reweighted as reweighted,
)
from .statistics import (
    Call as Call,
    InputStatistic as InputStatistic,
    activation_statistics as activation_statistics,
    check_repeatable as check_repeatable,
    over_batch as over_batch,
    summed as summed,
    sums_of_inputs as sums_of_inputs,
)
from .where import Where as Where, pick as pick
