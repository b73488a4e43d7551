"""Slow dense references of SOAP and KL-Shampoo in numpy, one matrix, from their equations.

The first moment lives in the original coordinates, where the library keeps it in the
rotated ones. Returns the list of updates U (before the learning rate and its sign).
"""

import numpy as np

from .dense import signed_qr


def eigenvectors(gram):
    return np.linalg.eigh(gram)[1][:, ::-1]


def refreshed(gram, basis, v, axis):
    """Columns in falling order, the second moment along with them, one power step."""
    order = np.argsort(-np.diag(basis.T @ gram @ basis), kind="stable")
    return signed_qr(gram @ basis[:, order]), np.take(v, order, axis=axis)


def soap(grads, *, left=True, right=True, every=10, lead=0, b1=0.95, b2=0.95, eps=1e-8):
    rows, cols = grads[0].shape
    m, v = np.zeros((rows, cols)), np.zeros((rows, cols))
    gram_l, gram_r = np.zeros((rows, rows)), np.zeros((cols, cols))
    q_l, q_r, out = np.eye(rows), np.eye(cols), []
    for t, g in enumerate(grads):
        if t == 0:
            out.append(np.zeros((rows, cols)))
        else:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * (q_l.T @ g @ q_r) ** 2
            m_hat = (q_l.T @ m @ q_r) / (1 - b1**t)
            out.append(q_l @ (m_hat / (np.sqrt(v / (1 - b2**t)) + eps)) @ q_r.T)
        gram_l = b2 * gram_l + (1 - b2) * g @ g.T
        gram_r = b2 * gram_r + (1 - b2) * g.T @ g
        if t == 0:
            q_l = eigenvectors(gram_l) if left else q_l
            q_r = eigenvectors(gram_r) if right else q_r
        elif (t + lead) % every == 0:
            if left:
                q_l, v = refreshed(gram_l, q_l, v, 0)
            if right:
                q_r, v = refreshed(gram_r, q_r, v, 1)
    return out


def kl_shampoo(grads, *, sides, every, lead, b1, b2, eps):
    """``(L ⊗ R)^(−½) vec(M)`` by mn × mn matrices; ``sides``: which are rotated.

    Each eigenvalue is that of a direction: it moves with its column of the basis.
    """
    shape = grads[0].shape
    momentum, grams = np.zeros(shape), [np.zeros((k, k)) for k in shape]
    bases, out = [np.eye(k) for k in shape], []
    for t, g in enumerate(grads):
        momentum = b1 * momentum + (1 - b1) * g
        if t == 0:
            values = [np.full(k, np.sqrt(np.mean(g**2))) for k in shape]
            out.append(np.zeros(shape))
        else:
            turn = np.kron(*bases)
            size = np.sqrt(np.kron(*values)) + eps
            out.append((turn / size @ turn.T @ momentum.reshape(-1)).reshape(shape))
        inverses = [q / v @ q.T for q, v in zip(bases, values, strict=True)]
        seen = [g @ inverses[1] @ g.T / shape[1], g.T @ inverses[0] @ g / shape[0]]
        for side, (new, q) in enumerate(zip(seen, list(bases), strict=True)):
            grams[side] = b2 * grams[side] + (1 - b2) * new
            if t:
                values[side] = b2 * values[side] + (1 - b2) * np.diag(q.T @ new @ q)
            least = values[side].max() / max(10, min(shape[side], 4000)) ** 2
            values[side] = np.maximum(values[side], least)
            if sides[side] and t == 0:
                bases[side] = eigenvectors(grams[side])
            elif sides[side] and (t + lead) % every == 0:
                bases[side], values[side] = refreshed(grams[side], q, values[side], 0)
    return np.stack(out)
