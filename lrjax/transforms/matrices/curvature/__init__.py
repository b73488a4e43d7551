"""Steps by the curvature, or the statistics, of each matrix."""

from .rotate_updates import (
    RotateUpdatesState as RotateUpdatesState,
    rotate_updates as rotate_updates,
)
from .scale_by_gradient_window import (
    ScaleByGradientWindowState as ScaleByGradientWindowState,
    scale_by_gradient_window as scale_by_gradient_window,
)
from .scale_by_kl_shampoo import (
    KroneckerFactor as KroneckerFactor,
    ScaleByKLShampooState as ScaleByKLShampooState,
    scale_by_kl_shampoo as scale_by_kl_shampoo,
)
from .scale_by_nystrom import (
    ScaleByNystromState as ScaleByNystromState,
    hessian_product as hessian_product,
    scale_by_nystrom as scale_by_nystrom,
)
from .scale_by_psgd import (
    ScaleByPSGDState as ScaleByPSGDState,
    scale_by_psgd as scale_by_psgd,
)
from .scale_by_psgd_kron import (
    ScaleByPSGDKronState as ScaleByPSGDKronState,
    scale_by_psgd_kron as scale_by_psgd_kron,
)
