"""Where factors start."""

from .along_matrix import (
    disjoint_svd_init as disjoint_svd_init,
    qr_init as qr_init,
    svd_init as svd_init,
    weighted_svd_init as weighted_svd_init,
)
from .without_matrix import (
    balanced_init as balanced_init,
    gaussian_init as gaussian_init,
    lora_init as lora_init,
    orthogonal_init as orthogonal_init,
    small_init as small_init,
)
