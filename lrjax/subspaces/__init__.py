"""Which subspace an optimizer works in, when it moves, and what becomes of the rest."""

from .bases import (
    Basis as Basis,
    Codes as Codes,
    Dense as Dense,
    Refresh as Refresh,
    Rows as Rows,
    coap as coap,
    decode as decode,
    ema_gram as ema_gram,
    encode as encode,
    fixed as fixed,
    gaussian as gaussian,
    geodesic as geodesic,
    gram_eigh as gram_eigh,
    oja as oja,
    power as power,
    quantized as quantized,
    random_orthonormal as random_orthonormal,
    randomized_svd as randomized_svd,
    range_finder as range_finder,
    rows as rows,
    sampled_svd as sampled_svd,
    shared as shared,
    svd as svd,
    switch as switch,
)
from .carry import (
    Carry as Carry,
    Change as Change,
    Moments as Moments,
    align as align,
    keep as keep,
    register_roles as register_roles,
    reset as reset,
    rotate as rotate,
    rotate_variance as rotate_variance,
    seeded_reset as seeded_reset,
)
from .grow import (
    grow_basis as grow_basis,
)
from .lift import (
    Feedback as Feedback,
    Lift as Lift,
    Projected as Projected,
    apollo as apollo,
    blend as blend,
    error_feedback as error_feedback,
    fira as fira,
    outer as outer,
    project as project,
    residual as residual,
    sampled_residual as sampled_residual,
    sign_residual as sign_residual,
)
from .schedule import (
    Schedule as Schedule,
    Turn as Turn,
    adaptive as adaptive,
    always as always,
    every as every,
    external as external,
)
from .sparse import (
    sparse_residual as sparse_residual,
)
from .view import (
    MatrixSpec as MatrixSpec,
    Rank as Rank,
    Side as Side,
    is_hidden_matrix as is_hidden_matrix,
    matrix_shape as matrix_shape,
)
