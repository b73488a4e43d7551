"""Methods for factors of ``X = L Rᵀ``, with explicit matrices and plain inverses.

A state is a list of pairs (L, R); ``slopes`` are their gradients. Each function gives the
list of directions (P_l, P_r), before the learning rate and its sign.
"""

import numpy as np

from .dense import Adam, polar


def damped_gram(x, damping, relative):
    """``xᵀx + λI``, λ perhaps in units of the mean diagonal."""
    gram = x.T @ x
    unit = np.trace(gram) / len(gram) if relative else 1.0
    return gram + damping * unit * np.eye(len(gram))


def scaled(pairs, slopes, *, damping, relative):
    """``P_l = G_l (RᵀR + λI)⁻¹`` and ``P_r = G_r (LᵀL + λI)⁻¹``."""
    out = []
    for (left, right), (g_left, g_right) in zip(pairs, slopes, strict=True):
        p_left = g_left @ np.linalg.inv(damped_gram(right, damping, relative))
        p_right = g_right @ np.linalg.inv(damped_gram(left, damping, relative))
        out.append((p_left, p_right))
    return out


def gauss_newton(pairs, slopes, *, damping):
    """``(JᵀJ + λI) P = G`` with the explicit Jacobian of ``(L, R) ↦ L Rᵀ``.

    λ is in units of the mean of the diagonals of both Gram matrices.
    """
    out = []
    for (left, right), (g_left, g_right) in zip(pairs, slopes, strict=True):
        (m, r), (n, _) = left.shape, right.shape
        columns = []
        for i in range(m * r):
            step = np.eye(1, m * r, i).reshape(m, r)
            columns.append((step @ right.T).ravel())
        for i in range(n * r):
            step = np.eye(1, n * r, i).reshape(n, r)
            columns.append((left @ step.T).ravel())
        jacobian = np.stack(columns, axis=1)
        unit = (np.sum(left**2) + np.sum(right**2)) / (2 * r)
        matrix = jacobian.T @ jacobian + damping * unit * np.eye(len(columns))
        p = np.linalg.solve(matrix, np.concatenate([g_left.ravel(), g_right.ravel()]))
        out.append((p[: m * r].reshape(m, r), p[m * r :].reshape(n, r)))
    return out


def inner(slopes, steps):
    return sum(
        np.sum(g * p)
        for gs, ps in zip(slopes, steps, strict=True)
        for g, p in zip(gs, ps, strict=True)
    )


def unit_length(slopes, steps):
    """Each pair by itself over ``sqrt(⟨G, P⟩)``."""
    out = []
    for g, (p_left, p_right) in zip(slopes, steps, strict=True):
        size = np.sqrt(inner([g], [(p_left, p_right)]))
        out.append((p_left / size, p_right / size))
    return out


def penalized(pairs, slopes, weight):
    """The gradients with that of ``weight/2 · (‖L‖² + ‖R‖²)``."""
    return [
        tuple(g + weight * x for g, x in zip(gs, xs, strict=True))
        for gs, xs in zip(slopes, pairs, strict=True)
    ]


def subgm(pairs, slopes):
    """Each factor moves along its gradient by its own length."""
    as_long = lambda g, x: g * np.linalg.norm(x) / np.linalg.norm(g)
    return [
        tuple(as_long(g, x) for g, x in zip(gs, xs, strict=True))
        for gs, xs in zip(slopes, pairs, strict=True)
    ]


def whitened_polar(pairs, momenta, *, damping):
    """``½ polar(M_l K_r) K_rᵀ`` with ``K Kᵀ = (Gram + λI)⁻¹``, and likewise right."""

    def half(m, partner):
        values, vectors = np.linalg.eigh(damped_gram(partner, damping, True))
        root = vectors @ np.diag(values**-0.5) @ vectors.T
        return 0.5 * polar(m @ root) @ root

    return [
        (half(m_left, right), half(m_right, left))
        for (left, right), (m_left, m_right) in zip(pairs, momenta, strict=True)
    ]


def projections(left, right):
    """Onto the columns of the two factors."""
    return left @ np.linalg.pinv(left), right @ np.linalg.pinv(right)


def tangent(pair, slopes):
    """``Π_l G + G Π_r − Π_l G Π_r`` from ``G R`` and ``Gᵀ L``."""
    (left, right), (g_left, g_right) = pair, slopes
    onto_left, _ = projections(left, right)
    from_left = np.linalg.pinv(left).T @ g_right.T
    return from_left + (np.eye(len(left)) - onto_left) @ g_left @ np.linalg.pinv(right)


def along_tangent(pair, slopes):
    """The step of the factors that halves what both can do."""
    (left, right), along = pair, tangent(pair, slopes)
    onto_left, onto_right = projections(left, right)
    half = lambda projection: np.eye(len(projection)) - projection / 2
    p_left = half(onto_left) @ along @ np.linalg.pinv(right).T
    p_right = half(onto_right) @ along.T @ np.linalg.pinv(left).T
    return p_left, p_right


def least_along_tangent(pair, slopes, scale):
    """LoRA-Pro's: of all steps with this product the shortest, by a Sylvester equation.

    ``P_r = (Gᵀ L)(LᵀL)⁻¹/s² + R Xᵀ`` and ``P_l = (I − Π_l)(G R)(RᵀR)⁻¹/s² − L X``.
    """
    (left, right), (g_left, g_right) = pair, slopes
    onto_left, _ = projections(left, right)
    gram_left, gram_right = left.T @ left, right.T @ right
    p_right = g_right @ np.linalg.inv(gram_left) / scale**2
    outside = (np.eye(len(left)) - onto_left) @ g_left
    p_left = outside @ np.linalg.inv(gram_right) / scale**2
    identity = np.eye(len(gram_left))
    # gram_left X + X gram_right = −P_rᵀ R, with X written out as a vector row by row.
    matrix = np.kron(gram_left, identity) + np.kron(identity, gram_right)
    x = np.linalg.solve(matrix, -(p_right.T @ right).ravel()).reshape(identity.shape)
    return p_left - left @ x, p_right + right @ x.T


class FullSizeAdam:
    """LoRA-Pro as published: Adam's moments of the projected gradient, ``m × n`` each."""

    def __init__(self, b1, b2, eps, scale):
        self.adam, self.scale = Adam(b1, b2, eps), scale

    def step(self, pair, slopes):
        left, right = pair
        # The slopes are s G R and s Gᵀ L.
        full = self.adam.step(tangent(pair, slopes) / self.scale)
        pulled = self.scale * full @ right, self.scale * full.T @ left
        return least_along_tangent(pair, pulled, self.scale)


def balanced(left, right):
    """Factors of the same product with equal, diagonal Gram matrices."""
    u, s, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    r = left.shape[1]
    return u[:, :r] * np.sqrt(s[:r]), vt[:r].T * np.sqrt(s[:r])


def riemannian(left, right, a, b):
    """``SVD_r(X + P(A, B))`` for a step (A, B) of the factors, as balanced factors.

    ``A K_r Rᵀ + L K_l Bᵀ − L K_l C K_r Rᵀ``, ``C = ½ (Lᵀ A + Bᵀ R)``. Of all balanced
    factors they are those nearest to the old.
    """
    k_left, k_right = np.linalg.inv(left.T @ left), np.linalg.inv(right.T @ right)
    c = 0.5 * (left.T @ a + b.T @ right)
    moved = left @ right.T + a @ k_right @ right.T + left @ k_left @ b.T
    moved = moved - left @ k_left @ c @ k_right @ right.T
    u, s, vt = np.linalg.svd(moved, full_matrices=False)
    r = left.shape[1]
    u, v = u[:, :r] * np.sqrt(s[:r]), vt[:r].T * np.sqrt(s[:r])
    turn = polar(u.T @ left + v.T @ right)
    return u @ turn, v @ turn


class LevelSearch:
    """A level to aim at in the place of the unknown smallest loss."""

    def __init__(self, fraction, patience, shrink, grow):
        self.fraction, self.patience = fraction, patience
        self.shrink, self.grow = shrink, grow
        self.learned, self.doubted = patience, None
        self.best = None

    def distance(self, value):
        """How far the loss is above the level of this step."""
        if self.best is None:
            self.best = self.base = value
            self.gap, self.path = self.fraction * abs(value), 0.0
        else:
            self.best = min(self.best, value)
            reached = self.best < self.base - 0.3 * self.gap
            missed = not reached and self.path > self.learned
            too_soon = self.doubted is not None and self.best < self.doubted
            if too_soon:
                self.doubted, self.learned = None, 3 * self.learned
            if missed:
                self.doubted = self.base - self.gap / 2
                self.gap *= self.shrink
                if not too_soon:
                    self.learned = max(0.9 * self.learned, self.patience)
            elif reached or too_soon:
                self.gap *= (self.grow if reached else 1) * (4 if too_soon else 1)
            if reached or missed or too_soon:
                self.base, self.path = self.best, 0.0
        distance = value - (self.base - self.gap)
        self.path += distance / self.gap
        return distance


def imbalance_pull(left, right, strength, ratio=None):
    """The gradient of ``λ ‖A Aᵀ − ρ BᵀB‖²`` by ``B = left`` and ``Aᵀ = right``.

    Neither factor is pulled by more than itself.
    """
    b, a = left, right.T
    rho = left.shape[1] / left.shape[0] if ratio is None else ratio
    off = a @ a.T - rho * b.T @ b
    rate = 4 * strength / max(1, 4 * strength * max(1, rho) * np.linalg.norm(off))
    return -rate * rho * b @ off, (rate * off @ a).T


def by_row_norms(left, right, step, most):
    """Each row of ``B`` and of ``A = rightᵀ`` times ``1/√(‖row‖ + 1/most²)``."""

    def scaled(rows, moves):
        return np.stack(
            [
                move / np.sqrt(np.sqrt(np.sum(row**2)) + 1 / most**2)
                for row, move in zip(rows, moves, strict=True)
            ]
        )

    return scaled(left, step[0]), scaled(right.T, step[1].T).T


def nearest_balanced(left, right):
    """Of the balanced factors of the product those nearest to the factors."""
    u, v = balanced(left, right)
    turn = polar(u.T @ left + v.T @ right)
    return u @ turn, v @ turn


class MomentumAhead:
    """How far, and along which dense matrix, LoRA-MGPO looks ahead."""

    def __init__(self, radius, smoothing, most, scale):
        self.radius, self.smoothing, self.most = radius, smoothing, most
        self.scale, self.size = scale, None

    def perturbation(self, b, a, m_b, m_a):
        """Of the weight, for a momentum of its factors."""
        direction = self.scale * (m_b @ a + b @ m_a)
        norm = np.linalg.norm(direction)
        if norm == 0:
            return np.zeros_like(direction)
        kappa = 1.0 if self.size is None else min(self.most, 1 / (self.size + 1e-12))
        return -self.radius * kappa * direction / norm

    def see(self, b, a, g_b, g_a):
        """One more gradient."""
        size = np.linalg.norm(self.scale * (g_b @ a + b @ g_a))
        old = size if self.size is None else self.size
        self.size = self.smoothing * old + (1 - self.smoothing) * size
