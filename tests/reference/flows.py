"""The balanced flow in decimals, by its formula as it stands."""

from decimal import Decimal, localcontext

import numpy as np


def balanced_flow(t, left, right, u, sigma, v, digits=300):
    """``Z Zᵀ`` at the time t for ``M = U diag(σ) Vᵀ``, U square and V square or wider.

    ``Z Zᵀ = e^{St} Z₀ [I + Z₀ᵀ Φ Z₀]⁻¹ Z₀ᵀ e^{St}`` with the eigenvectors of S from the
    singular vectors of M.
    """
    with localcontext() as context:
        context.prec = digits
        u, sigma, v, left, right = (
            np.vectorize(lambda x: Decimal(float(x)), otypes=[object])(np.asarray(x))
            for x in (u, sigma, v, left, right)
        )
        n, half = len(sigma), 1 / Decimal(2).sqrt()
        pairs = [np.concatenate([u[:, :n], sign * v]) * half for sign in (1, -1)]
        rest = np.concatenate([u[:, n:], np.zeros((len(v), u.shape[1] - n), object)])
        vectors = np.concatenate([*pairs, rest], axis=1)
        values = [*sigma, *(-sigma), *([Decimal(0)] * rest.shape[1])]
        t = Decimal(float(t))
        z = vectors.T @ np.concatenate([left, right])
        phi = [((2 * l * t).exp() - 1) / (2 * l) if l else t for l in values]
        small = np.array(
            [[Decimal(int(i == j)) for j in range(z.shape[1])] for i in range(z.shape[1])]
        )
        small = small + z.T @ (np.array(phi)[:, None] * z)
        grown = vectors @ (np.array([(l * t).exp() for l in values])[:, None] * z)
        return (grown @ _solve(small, grown.T)).astype(float)


def _solve(a, b):
    """Gauss and Jordan, for a positive definite matrix of objects."""
    a, b = a.copy(), b.copy()
    for k in range(len(a)):
        b[k], a[k] = b[k] / a[k, k], a[k] / a[k, k]
        for i in range(len(a)):
            if i != k:
                b[i], a[i] = b[i] - a[i, k] * b[k], a[i] - a[i, k] * a[k]
    return b
