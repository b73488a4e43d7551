"""Moments of one factor in the frame of its partner, from the equations, in NumPy."""

import numpy as np


class MatrixAdam:
    """LoRA-RITE's moments of the left factor, in the frame of a QR decomposition."""

    def __init__(self, b1, b2, eps, conserve):
        self.b1, self.b2, self.eps, self.conserve = b1, b2, eps, conserve
        self.step, self.frame = 0, None

    def __call__(self, gradient, partner):
        q, t = np.linalg.qr(partner)
        whitened = gradient @ np.linalg.inv(t)
        rank = q.shape[1]
        if self.frame is None:
            self.m, self.v = np.zeros_like(whitened), np.zeros((rank, rank))
            self.frame = q
        p = q.T @ self.frame
        before, self.v = np.trace(self.v), p @ self.v @ p.T
        if self.conserve:
            new = np.eye(rank) - p @ p.T
            if np.trace(new) > 1e-12:
                self.v = self.v + new * (before - np.trace(self.v)) / np.trace(new)
        self.step += 1
        t1, t2 = (self._decay(b) for b in (self.b1, self.b2))
        self.v = t2 * self.v + (1 - t2) * whitened.T @ whitened / len(whitened)
        w, e = np.linalg.eigh(self.v)
        u = whitened @ (e / (np.sqrt(np.maximum(w, 0)) + self.eps)) @ e.T
        self.m = t1 * self.m @ p.T + (1 - t1) * u
        self.frame = q
        return self.m @ np.linalg.inv(t).T

    def _decay(self, b):
        return b * (1 - b ** (self.step - 1)) / (1 - b**self.step)


class ProjectedMomentum:
    """AltLoRA's: ``M ← β M Rᵀ₋ R (RᵀR)⁻¹ + (1 − β) G (RᵀR)⁻¹`` of the left factor."""

    def __init__(self, b1):
        self.b1, self.m, self.partner = b1, None, None

    def __call__(self, gradient, partner):
        inverse = np.linalg.inv(partner.T @ partner)
        new = gradient @ inverse
        if self.m is None:
            self.m = np.zeros_like(new)
        else:
            self.m = self.m @ self.partner.T @ partner @ inverse
        self.m = self.b1 * self.m + (1 - self.b1) * new
        self.partner = partner
        return self.m
