"""Which subspace: the bases, by how they are found."""

from .basis import (
    Basis as Basis,
    Dense as Dense,
    Refresh as Refresh,
    Rows as Rows,
    fixed as fixed,
    gram_eigh as gram_eigh,
    randomized_svd as randomized_svd,
    range_finder as range_finder,
    svd as svd,
    switch as switch,
)
from .power import (
    power as power,
)
from .quantized import (
    Codes as Codes,
    decode as decode,
    encode as encode,
    quantized as quantized,
)
from .sampled import (
    gaussian as gaussian,
    random_orthonormal as random_orthonormal,
    rows as rows,
    sampled_svd as sampled_svd,
)
from .shared import (
    shared as shared,
)
from .tracking import (
    coap as coap,
    ema_gram as ema_gram,
    geodesic as geodesic,
    oja as oja,
)
