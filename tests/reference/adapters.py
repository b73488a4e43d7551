"""Adapted weights as the papers write them, dense, in float64."""

import numpy as np
import scipy.linalg


def lora(weight, b, a, scale):
    """Hu et al. (2021): ``W + s B A``."""
    return weight + scale * b @ a


def residual(weight, b, a, b0, a0, scale):
    """Meng et al. (2024): ``W_res + s B A`` with ``W_res = W − s B₀ A₀``."""
    return (weight - scale * b0 @ a0) + scale * b @ a


def dora(weight, b, a, scale, magnitude):
    """Liu et al. (2024): every row of ``V = W + s B A`` has length m."""
    v = weight + scale * b @ a
    return np.stack(
        [m * row / np.linalg.norm(row) for m, row in zip(magnitude, v, strict=True)]
    )


def gated(weight, b, gate, a, scale):
    """Zhang et al. (2023) with E, Ding et al. (2023) with g: ``W + s B diag(g) A``."""
    return weight + scale * b @ np.diag(gate) @ a


def prefix(weight, b, a, rank, scale):
    """Valipour et al. (2022), Muñoz et al. (2025): the first columns of B, rows of A."""
    return weight + scale * b[:, :rank] @ a[:rank]


def capaboost(weight, b, a, masks, scale):
    """Song et al. (2024): ``W + s Σ_k (B ⊙ M_k)(A ⊙ N_k)``."""
    return weight + scale * sum((b * m) @ (a * n) for m, n in masks)


def bora(weight, b, a, scale, magnitude, columns):
    """Wang et al. (2024): rows of DoRA, then every column of H has length c."""
    h = dora(weight, b, a, scale, magnitude)
    return h / np.linalg.norm(h, axis=0) * columns


def vera(weight, lambda_b, shared_b, lambda_d, shared_a):
    """Kopiczko et al. (2023): ``W + Λ_b B Λ_d A`` with the first rows and columns."""
    out, inputs = weight.shape
    b, a = shared_b[:out], shared_a[:, :inputs]
    return weight + np.diag(lambda_b) @ b @ np.diag(lambda_d) @ a


def randlora(weight, wide, narrow, ranks, gains, scale):
    """Albert et al. (2025): ``W + s Σ_j B_j Λ_j A Γ_j``, or the transpose of the sum."""
    small, large = sorted(weight.shape)
    count, rank = ranks.shape
    bases = wide[:large, : count * rank].reshape(large, rank, count)
    change = sum(
        bases[:, :, j] @ np.diag(ranks[j]) @ narrow[:small].T @ np.diag(gains[j])
        for j in range(count)
    )
    return weight + scale * (change if weight.shape[1] == small else change.T)


def lora_xs(weight, u, core, values, v, scale):
    """Bałazy et al. (2024): ``W + s U R Σ Vᵀ`` with r singular triplets of W."""
    return weight + scale * u @ core @ np.diag(values) @ v.T


def miss(weight, block):
    """Kang and Yin (2024): column j of D modulo r is added to column j of W."""
    rank = block.shape[1]
    columns = [weight[:, j] + block[:, j % rank] for j in range(weight.shape[1])]
    return np.stack(columns, axis=1)


def bat(weight, maps):
    """The same, block affine: ``W_ij (I + C_i) + C_i``."""
    new, r = weight.copy(), maps.shape[-1]
    for i, c in enumerate(maps):
        for j in range(weight.shape[1] // r):
            block = np.s_[i * r : (i + 1) * r, j * r : (j + 1) * r]
            new[block] = weight[block] @ (np.eye(r) + c) + c
    return new


def gralora(weight, b, a, scale):
    """Jung et al. (2025): ``W_ij + s B_ij A_ij`` for each block of a grid."""
    return weight + scale * np.block(
        [[b[i, j] @ a[i, j] for j in range(b.shape[1])] for i in range(b.shape[0])]
    )


def hira(weight, b, a):
    """Huang et al. (2025): ``W ⊙ (1 + B A)``."""
    return weight + weight * (b @ a)


def flora(weight, b, a):
    """Wen and Chaudhuri (2023): ``W ⊙ (B A)``, the mean over the rank."""
    return weight * (b @ a) / len(a)


def loha(weight, b, a, d, c, scale):
    """Hyeon-Woo et al. (2021): ``W + s (B A) ⊙ (D C)``."""
    return weight + scale * (b @ a) * (d @ c)


def ia3(weight, bias, gains, side):
    """Liu et al. (2022): every output, or every input, times its own gain."""
    if side == "outputs":
        return np.diag(gains) @ weight, gains * bias
    return weight @ np.diag(gains), bias


def tiny_lora(weight, b, matrices, weights, a):
    """Morris et al. (2026): ``W + B (Σ_u v_u P_u) A``."""
    core = sum(v * p for v, p in zip(weights, matrices, strict=True))
    return weight + b @ core @ a


def loldu(weight, rank, pivots, scale):
    """Shi et al. (2024): the residual ``W − s P L D U`` and ``s P L diag(z) U``."""
    p, lower, upper = scipy.linalg.lu(weight)
    d = np.diag(upper)[:rank]
    left, right = (p @ lower)[:, :rank], upper[:rank] / d[:, None]
    residual = weight - scale * left @ np.diag(d) @ right
    return residual + scale * left @ np.diag(pivots) @ right


def nora(weight, outer_b, b, a, outer_a, scale):
    """Lin et al. (2024): ``W + s B B' A' A`` between the triplets of W."""
    return weight + scale * outer_b @ (b @ a) @ outer_a


def lokr(weight, outer, inner, scale):
    """Yeh et al. (2023): ``W + s A ⊗ B``, entry by entry."""
    (m, n), change = inner.shape, np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            change[i, j] = outer[i // m, j // n] * inner[i % m, j % n]
    return weight + scale * change


def oft(weight, angles, size):
    """Qiu et al. (2025): rows times the transposed rotation of each block of inputs."""
    new = weight.copy()
    for k, block in enumerate(angles):
        q = np.zeros((size, size))
        q[np.triu_indices(size, 1)] = block
        q -= q.T
        turn = (np.eye(size) + q) @ np.linalg.inv(np.eye(size) - q)
        here = slice(k * size, (k + 1) * size)
        new[:, here] = weight[:, here] @ turn.T
    return new


def soda(weight, shift, angles, sizes):
    """Zhang et al. (2024): ``U relu(S + δ) Vᵀ Qᵀ`` with Q a Kronecker product."""
    u, values, vt = np.linalg.svd(weight, full_matrices=False)
    turn = np.eye(1)
    for triangle, size in zip(angles, sizes, strict=True):
        # Rows that are turned are multiplied with the transpose, which is that of oft.
        turn = np.kron(turn, oft(np.eye(size), triangle[None], size).T)
    return u @ np.diag(np.maximum(values + shift, 0)) @ vt @ turn.T


def tucker(kernel, core, factors, scale):
    """Si et al. (2024): the core times a matrix along each axis of the kernel."""
    change = core
    for axis, factor in enumerate(factors):
        change = np.moveaxis(np.tensordot(factor, change, axes=(1, axis)), 0, axis)
    return kernel + scale * change


def tensor_train(cores):
    """Oseledets (2011): the matrix of a matrix product operator, entry by entry."""
    rows, cols = ([core.shape[k] for core in cores] for k in (1, 2))
    matrix = np.zeros((np.prod(rows), np.prod(cols)))
    for i, to in enumerate(np.ndindex(*rows)):
        for j, fro in enumerate(np.ndindex(*cols)):
            product = np.eye(1)
            for core, a, b in zip(cores, to, fro, strict=True):
                product = product @ core[:, a, b]
            matrix[i, j] = product[0, 0]
    return matrix
