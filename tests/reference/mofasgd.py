"""A slow dense reference of MoFaSGD in numpy: the momentum is a full matrix.

Each step forms the projected gradient and truncates by a full SVD. Returns the updates
U Vᵀ and the momenta.
"""

import numpy as np


def leading(x, rank):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def mofasgd(grads, rank, decay=0.95):
    left, values, right = leading(grads[0], rank)
    updates = [left @ right.T]
    momenta = [left @ np.diag(values) @ right.T]
    for g in grads[1:]:
        p, q = left @ left.T, right @ right.T
        tangent = p @ g + g @ q - p @ g @ q
        left, values, right = leading(decay * momenta[-1] + tangent, rank)
        updates.append(left @ right.T)
        momenta.append(left @ np.diag(values) @ right.T)
    return np.stack(updates), np.stack(momenta)
