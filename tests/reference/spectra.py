"""Methods that shape singular values in training, densely, in float64."""

import numpy as np


def spectral(w, f):
    """``U diag(f(σ)) Vᵀ``, for one matrix."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return sum(value * np.outer(u[:, k], vt[k]) for k, value in enumerate(f(s)))


def kept(s, energy):
    """The fewest leading singular values that hold a share of the squares, one by one."""
    total, held, count = np.sum(s**2), 0.0, 0
    while held < energy * total * (1 - 1e-12):
        held += s[count] ** 2
        count += 1
    return count


def keep_energy(w, energy):
    return spectral(w, lambda s: s * (np.arange(len(s)) < kept(s, energy)))


def trp(w, grad, *, rate, energy, period, nuclear_weight, steps):
    """Xu et al. (2020), with the projection at the end of a step."""
    buffer = np.zeros_like(w)
    for t in range(1, steps + 1):
        g = grad(w)
        if t % period == 0:
            ones = lambda s: np.arange(len(s)) < kept(s, energy)
            g = g + nuclear_weight * spectral(w, ones)
        buffer = 0.9 * buffer + g
        w = w - rate * buffer
        if t % period == 0:
            w = keep_energy(w, energy)
        yield w


def prefix_slope(u, v, target, width):
    """The gradient of ``‖U_b V_bᵀ − T‖²`` with the first b columns, in all columns."""
    rest = u[:, :width] @ v[:, :width].T - target
    du, dv = np.zeros_like(u), np.zeros_like(v)
    du[:, :width], dv[:, :width] = 2 * rest @ v[:, :width], 2 * rest.T @ u[:, :width]
    return du, dv


def lasso_slope(u, strength):
    """Of ``strength Σ_b ‖U[:, b:]‖``, group by group; groups of zeros give none."""
    slope = np.zeros_like(u)
    for b in range(u.shape[1]):
        length = np.linalg.norm(u[:, b:])
        if length > 0:
            slope[:, b:] += strength * u[:, b:] / length
    return slope


def maestro(u, v, target, widths, *, rate, strength, threshold, period):
    """Horváth et al. (2023) on one layer: columns are cut off, and arrays shrink."""
    mu, mv = np.zeros_like(u), np.zeros_like(v)
    for t, width in enumerate(widths, start=1):
        du, dv = prefix_slope(u, v, target, width)
        mu = 0.9 * mu + du + lasso_slope(u, strength)
        mv = 0.9 * mv + dv + lasso_slope(v, strength)
        u, v = u - rate * mu, v - rate * mv
        if t % period == 0:
            tails = [
                np.linalg.norm(u[:, b:]) * np.linalg.norm(v[:, b:])
                for b in range(u.shape[1])
            ]
            rank = max(sum(tail >= threshold for tail in tails), 1)
            u, v, mu, mv = (x[:, :rank] for x in (u, v, mu, mv))
        yield u, v


def learning_compression(
    w, grad, *, rate, rank_weight, penalty, penalty_growth, period, steps
):
    """Idelbayev and Carreira-Perpiñán (2020): weights, and their compressed copies."""
    multiplier, mu = np.zeros_like(w), penalty
    for t in range(steps):
        if t % period == 0:
            u, s, vt = np.linalg.svd(w - multiplier / mu, full_matrices=False)
            cost = [
                rank_weight * r * sum(w.shape) + mu / 2 * np.sum(s[r:] ** 2)
                for r in range(len(s) + 1)
            ]
            r = int(np.argmin(cost))
            copy = (u[:, :r] * s[:r]) @ vt[:r]
            if t > 0:
                multiplier = multiplier - mu * (w - copy)
                mu = mu * penalty_growth
        w = w - rate * (grad(w) + mu * (w - copy) - multiplier)
        yield w


def spectral_step(u, s, v, g, chosen, rate):
    """A step of Zhao et al. (2024) along plain gradients, column by column."""
    u, s, v = u.copy(), s.copy(), v.copy()
    values = [s[i] - rate * u[:, i] @ g @ v[:, i] for i in range(len(s))]
    for i in chosen:
        left, right = u[:, i] - rate * g @ v[:, i], v[:, i] - rate * g.T @ u[:, i]
        u[:, i], v[:, i] = left / np.linalg.norm(left), right / np.linalg.norm(right)
    return u, np.maximum(values, 0), v
