"""Arrays in, arrays out: the decompositions that every other room is built on."""

from .angles import principal_angles as principal_angles
from .gram import (
    gram as gram,
    inverse_gram as inverse_gram,
    inverse_root_gram as inverse_root_gram,
)
from .orthonormalize import orthonormalize as orthonormalize
from .polar import polar as polar
from .product_svd import product_svd as product_svd
from .truncated_svd import TruncatedSVD as TruncatedSVD, truncated_svd as truncated_svd
