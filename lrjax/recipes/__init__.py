"""Named optimizers: each is one short chain of transforms, named as in its paper."""

from .apollo import apollo as apollo
from .coap import coap as coap
from .dion import dion as dion
from .fira import fira as fira
from .flora import flora as flora
from .frugal import frugal as frugal
from .galore import galore as galore
from .golore import golore as golore
from .ldadam import ldadam as ldadam
from .online_subspace_descent import online_subspace_descent as online_subspace_descent
from .opsa import opsa as opsa
from .scaled_gd import scaled_gd as scaled_gd
from .scaled_subgradient import scaled_subgradient as scaled_subgradient
from .subspace_adam import subspace_adam as subspace_adam
from .subtrack import subtrack as subtrack
