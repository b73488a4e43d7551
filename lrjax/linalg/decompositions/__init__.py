"""Matrices as products of simpler ones, exact and to a rank."""

from .pivoted_columns import pivoted_columns as pivoted_columns
from .polar import check_polar_method as check_polar_method, polar as polar
from .procrustes import procrustes as procrustes
from .product_svd import product_svd as product_svd
from .subspace_iteration import subspace_iteration as subspace_iteration
from .svd_and_eigh import eigh as eigh, singular_values as singular_values, svd as svd
from .truncated_svd import TruncatedSVD as TruncatedSVD, truncated_svd as truncated_svd
from .weighted_svd import weighted_svd as weighted_svd
