"""Named optimizers: each is one short chain of transforms, named as in its paper."""

from .factors import (
    levenberg_marquardt as levenberg_marquardt,
    lora_muon as lora_muon,
    loro as loro,
    opsa as opsa,
    prec_gd as prec_gd,
    scaled_gd as scaled_gd,
    scaled_subgradient as scaled_subgradient,
    subgm as subgm,
)
from .momentum import dion as dion, mofasgd as mofasgd, power_sgd as power_sgd
from .projection import (
    coap as coap,
    flora as flora,
    galore as galore,
    galore_plus as galore_plus,
    golore as golore,
    grass as grass,
    ldadam as ldadam,
    online_subspace_descent as online_subspace_descent,
    q_galore as q_galore,
    sara as sara,
    sumo as sumo,
)
from .residual import (
    adam_sn as adam_sn,
    apollo as apollo,
    fira as fira,
    frugal as frugal,
    snsm as snsm,
    subspace_adam as subspace_adam,
    subtrack as subtrack,
)
from .rotation import psgd as psgd, soap as soap
