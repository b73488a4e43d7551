"""Steps of one factor by the Gram matrix, or the moments, of the other."""

from .scale_by_gauss_newton import scale_by_gauss_newton as scale_by_gauss_newton
from .scale_by_gram import (
    ScaleByGramState as ScaleByGramState,
    scale_by_gram as scale_by_gram,
    unit_norm as unit_norm,
)
from .scale_by_matrix_adam import (
    ScaleByMatrixAdamState as ScaleByMatrixAdamState,
    scale_by_matrix_adam as scale_by_matrix_adam,
)
from .scale_by_row_norms import scale_by_row_norms as scale_by_row_norms
from .scale_by_tangent import scale_by_tangent as scale_by_tangent
