"""Optimizers whose update stays in the subspace that holds their state."""

from .coap import coap as coap
from .flora import flora as flora
from .galore import galore as galore
from .golore import golore as golore
from .ldadam import ldadam as ldadam
from .online_subspace_descent import online_subspace_descent as online_subspace_descent
