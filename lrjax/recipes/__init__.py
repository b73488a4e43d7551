"""Named optimizers: each is one short chain of transforms, named as in its paper."""

from .factors import (
    opsa as opsa,
    scaled_gd as scaled_gd,
    scaled_subgradient as scaled_subgradient,
)
from .momentum import dion as dion, power_sgd as power_sgd
from .projection import (
    coap as coap,
    flora as flora,
    galore as galore,
    golore as golore,
    ldadam as ldadam,
    online_subspace_descent as online_subspace_descent,
)
from .residual import (
    apollo as apollo,
    fira as fira,
    frugal as frugal,
    subspace_adam as subspace_adam,
    subtrack as subtrack,
)
from .rotation import soap as soap
