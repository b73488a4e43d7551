"""Split a matrix into a low-rank and a sparse part."""

from .fit_robust_pca import (
    RobustPCAFit as RobustPCAFit,
    fit_robust_pca as fit_robust_pca,
)
