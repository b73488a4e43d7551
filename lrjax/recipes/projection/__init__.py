"""Optimizers whose update stays in the subspace that holds their state."""

from .coap import coap as coap
from .flora import flora as flora
from .galore import galore as galore
from .galore_plus import galore_plus as galore_plus
from .golore import golore as golore
from .grass import grass as grass
from .ldadam import ldadam as ldadam
from .online_subspace_descent import online_subspace_descent as online_subspace_descent
from .q_galore import q_galore as q_galore
from .sara import sara as sara
from .sumo import sumo as sumo
