"""Adam in a subspace of one p × q matrix with p <= q: the GaLore family, slowly.

Every function is written from the equations of its method and returns the stacked
updates U, before weight decay, the learning rate and its sign. ``due`` is the set of
steps on which the basis is refreshed.
"""

import numpy as np

from .dense import Adam, Growth, leading, randomized, signed_qr
from .eight_bits import four_bit_basis


def projected_adam(grads, due, new_basis, moments, *, carry=None, lift=None):
    """``R = Pᵀ G``, ``N = adam(R)`` and what the lift makes of them; ``P N`` by default.

    ``new_basis(g, old basis, first moment, step)``, ``carry(moments, C, R)`` with ``C =
    P_newᵀ P_old`` and ``R`` in the new basis, ``lift(g, basis, R, N)``.
    """
    basis, out = None, []
    for t, g in enumerate(grads):
        if t in due:
            new = new_basis(g, basis, moments.m, t)
            if basis is not None and carry is not None:
                carry(moments, new.T @ basis, new.T @ g)
            basis = new
        r = basis.T @ g
        step = moments.step(r)
        out.append(basis @ step if lift is None else lift(g, basis, r, step))
    return np.stack(out)


def rotate_mean(moments, c, r):
    moments.m = c @ moments.m


def transported_variance(m, v, c, t, b1, b2):
    """The second moment in new coordinates ``C x``, of t gradients.

    What a new direction has outside the old ones varies like those that leave.
    """
    v_hat = v / (1 - b2**t)
    m_hat = np.clip(m / (1 - b1**t), -np.sqrt(v_hat), np.sqrt(v_hat))
    entering, leaving = 1 - (c * c).sum(1), 1 - (c * c).sum(0)
    outside = leaving @ v_hat / leaving.sum() if leaving.sum() > 0 else 0 * v_hat[0]
    inside = (c * c) @ (v_hat - m_hat**2) + (c @ m_hat) ** 2
    return (1 - b2**t) * (inside + np.outer(entering, outside))


def rotate_both(moments, c, r):
    a = moments
    a.v = transported_variance(a.m, a.v, c, a.t, a.b1, a.b2)
    a.m = c @ a.m


def scaled_residual(limit):
    """``(G − P R) diag(φ)`` with ``φ_j = ‖N_j‖/‖R_j‖``, its growth limited."""

    def outside(g, basis, r, step):
        phi = np.linalg.norm(step, axis=0) / np.linalg.norm(r, axis=0)
        return limit.limit((g - basis @ r) * phi)

    return outside


# Updates that stay in the subspace.


def galore(grads, due, *, rank, scale, b1, b2, eps, signs):
    svd = lambda g, *_: leading(g, rank, signs)
    return scale * projected_adam(grads, due, svd, Adam(b1, b2, eps))


def randomized_galore(grads, due, *, rank, scale, sketch, b1, b2, eps, signs):
    basis = lambda g, p, m, t: randomized(g, rank, sketch(t), 1, signs)
    return scale * projected_adam(grads, due, basis, Adam(b1, b2, eps))


def galore_plus(
    heads, head, due, *, rank, scale, entries, sketch, drawn, b1, b2, eps, signs
):
    """One of several heads, by the basis of the one that is drawn at each refresh.

    ``entries`` is the mask of the entries whose residuals Adam follows.
    """
    basis = lambda g, p, m, t: randomized(heads[drawn(t)][t], rank, sketch(t), 1, signs)
    outside = Adam(b1, b2, eps)
    sparse = lambda g, p, r: outside.step(np.where(entries, g - p @ r, 0))
    lift = lambda g, p, r, step: p @ step + sparse(g, p, r)
    moments = Adam(b1, b2, eps)
    return scale * projected_adam(heads[head], due, basis, moments, lift=lift)


def one_of_each_run(shape, fraction, shares):
    """A mask of one entry, at a given share, of each of nearly equal runs of entries."""
    runs = np.array_split(
        np.arange(np.prod(shape)), max(1, round(fraction * np.prod(shape)))
    )
    mask = np.zeros(np.prod(shape), bool)
    for run, share in zip(runs, shares, strict=True):
        mask[run[int(share * len(run))]] = True
    return mask.reshape(shape)


def q_galore(grads, *, period, threshold, rank, scale, block, store, b1, b2, eps, signs):
    """GaLore in a basis of four bits, with moments of eight; the period doubles.

    ``store(moments, signed, step)`` is what is left of moments after a step.
    """
    moments, basis, out = Adam(b1, b2, eps), None, []
    due, overlaps = 0, []
    for t, g in enumerate(grads):
        if t == due:
            new = four_bit_basis(leading(g, rank, signs), block)
            overlaps.append(0.0 if basis is None else abs(new[:, 0] @ basis[:, 0]))
            # The first basis has no predecessor, so that it takes six to have five.
            if len(overlaps) > 5 and np.mean(overlaps[-5:]) >= threshold:
                period = 2 * period
            due, basis = t + period, new
        out.append(scale * basis @ moments.step(basis.T @ g))
        moments.m = store(moments.m, True, t + 1)
        moments.v = store(moments.v, False, t + 1)
    return np.stack(out)


def stored_adam(grads, *, store, b1, b2, eps):
    """Adam whose moments are kept at eight bits between its steps."""
    moments, out = Adam(b1, b2, eps), []
    for t, g in enumerate(grads, start=1):
        out.append(moments.step(g))
        moments.m = store(moments.m, True, t)
        moments.v = store(moments.v, False, t)
    return np.stack(out)


def grass(grads, due, *, rank, scale, b1, b2, eps):
    """The longest rows; a refresh forgets as if all gradients had been like this one."""

    def pick(g, basis, m, t):
        return np.eye(len(g))[:, np.argsort(-np.sum(g**2, axis=1))[:rank]]

    def seed(moments, c, r):
        moments.m = (1 - b1**moments.t) * r
        squares = np.mean(r**2, axis=1, keepdims=True)
        moments.v = (1 - b2**moments.t) * np.broadcast_to(squares, r.shape)

    return scale * projected_adam(grads, due, pick, Adam(b1, b2, eps), carry=seed)


def golore(grads, due, *, rank, switch_at, columns, scale, b1, b2, eps):
    """``columns(t)``: Gaussian ones, whose span is uniformly random."""

    def basis(g, p, m, t):
        return leading(g, rank) if t < switch_at else signed_qr(columns(t))

    moments = Adam(b1, b2, eps)
    return scale * projected_adam(grads, due, basis, moments, carry=rotate_mean)


def sara(grads, due, *, rank, gumbel, scale, b1, b2, eps, signs):
    """Singular vectors without replacement with weights σ: the largest log σ + Gumbel."""

    def draw(g, p, m, t):
        scores = np.log(np.linalg.svd(g, compute_uv=False)) + gumbel(t)
        kept = np.sort(np.argsort(-scores)[:rank])
        return leading(g, len(g), signs)[:, kept]

    return scale * projected_adam(grads, due, draw, Adam(b1, b2, eps))


def coap(grads, due, *, start, period, recalibrate, step_size, scale, b1, b2, eps):
    def basis(g, p, m, t):
        if p is None or t // period % recalibrate == 0:
            p = start if p is None else p
            return leading(g @ signed_qr(g.T @ p), p.shape[1])
        slope = coap_gradient(p, g, m)
        return p - step_size * slope / max(1, np.linalg.norm(slope))

    moments = Adam(b1, b2, eps)
    return scale * projected_adam(grads, due, basis, moments, carry=rotate_mean)


def coap_gradient(p, a, m):
    """Of ``mean((P Pᵀ a − a)²) · (1 − mean_j cos((P m)_j, a_j))`` with respect to P."""
    e, lifted = p @ p.T @ a - a, p @ m
    error, d_error = np.mean(e**2), 2 * (e @ a.T + a @ e.T) @ p / a.size
    l, n = np.linalg.norm(lifted, axis=0), np.linalg.norm(a, axis=0)
    cosines = np.sum(lifted * a, axis=0) / (l * n)
    d_cosines = (a / (l * n) - lifted * cosines / l**2) @ m.T / a.shape[1]
    return d_error * (1 - np.mean(cosines)) - error * d_cosines


def online_subspace_descent(grads, *, rank, rates, penalty, b1, b2, eps):
    """``rates``: those of the basis, which takes its first step on the second gradient."""
    trainer = Adam(b1, b2, eps)

    def train(g, p, m, t):
        if p is None:
            return leading(g, rank)
        a = g / np.linalg.norm(g)
        e = p @ p.T @ a - a
        slope = 2 * (e @ a.T + a @ e.T) @ p + 4 * penalty * p @ (p.T @ p - np.eye(rank))
        return p - rates[trainer.t] * trainer.step(slope)

    return projected_adam(grads, range(len(grads)), train, Adam(b1, b2, eps))


def ldadam(grads, *, rank, rho, b1, b2, eps, feedback):
    error, moments, basis, out = np.zeros_like(grads[0]), Adam(b1, b2, eps), None, []
    for g in grads:
        a, lost = g + error, 0.0
        if basis is None:
            basis = leading(a, rank)
        else:
            m_hat = moments.m / (1 - b1**moments.t)
            b = rho * basis @ m_hat + (1 - rho) * a
            new = signed_qr(b @ b.T @ basis)
            old_momentum = basis @ moments.m
            rotate_both(moments, new.T @ basis, None)
            lost, basis = old_momentum - new @ moments.m, new
        r = basis.T @ a
        out.append(basis @ moments.step(r))
        if feedback:
            error = a - basis @ r + b1 / (1 - b1) * lost
    return np.stack(out)


# Updates that follow what the subspace leaves out.


def fira(grads, due, *, rank, scale, growth, b1, b2, eps, signs):
    outside = scaled_residual(Growth(growth))
    svd = lambda g, *_: leading(g, rank, signs)
    lift = lambda g, p, r, step: scale * p @ step + outside(g, p, r, step)
    return projected_adam(grads, due, svd, Adam(b1, b2, eps), lift=lift)


def frugal(grads, due, *, rank, residual, b1, b2, eps):
    svd = lambda g, *_: leading(g, rank)
    lift = lambda g, p, r, step: p @ step + residual * np.sign(g - p @ r)
    return projected_adam(grads, due, svd, Adam(b1, b2, eps), carry=rotate_mean, lift=lift)


def subtrack(grads, due, *, rank, step_size, scale, growth, b1, b2, eps, signs):
    outside = scaled_residual(Growth(growth))

    def track(g, p, m, t):
        return leading(g, rank, signs) if p is None else geodesic_step(p, g, step_size)

    lift = lambda g, p, r, step: scale * p @ step + outside(g, p, r, step)
    return projected_adam(
        grads, due, track, Adam(b1, b2, eps), carry=rotate_both, lift=lift
    )


def geodesic_step(p, a, step_size):
    """Along the leading direction ``σ u vᵀ`` of the descent of ``‖a − P Pᵀ a‖²``.

    No further than the direction in the plane of ``P v`` and ``u`` that ``a`` fills most.
    """
    r = p.T @ a
    u, s, vt = np.linalg.svd(2 * (a - p @ r) @ r.T, full_matrices=False)
    u, v = u[:, :1], vt[:1].T
    plane = np.concatenate([p @ v, u], axis=1).T @ a
    along, across = np.abs(np.linalg.eigh(plane @ plane.T)[1][:, -1])
    angle = min(s[0] * step_size, np.arctan2(across, along))
    return p + (p @ v * (np.cos(angle) - 1) + u * np.sin(angle)) @ v.T


def subspace_adam(grads, *, start, blocks, growth, b1, b2, eps):
    """Each gradient is stepped on in the old basis, of which it then turns a block."""
    basis, moments, out = start.copy(), Adam(b1, b2, eps), []
    outside, rank = scaled_residual(Growth(growth)), start.shape[1]
    size = -(-rank // blocks)
    for t, g in enumerate(grads):
        r = basis.T @ g
        step = moments.step(r)
        out.append(basis @ step + outside(g, basis, r, step))
        first = min(t % blocks * size, rank - size)
        turned = np.arange(first, first + size)
        others = np.delete(basis, turned, axis=1)
        off_others = np.eye(len(g)) - others @ others.T
        new = basis.copy()
        new[:, turned] = signed_qr(off_others @ g @ g.T @ basis[:, turned])
        c = new[:, turned].T @ basis[:, turned]
        m, v = moments.m[turned], moments.v[turned]
        moments.v[turned] = transported_variance(m, v, c, moments.t, b1, b2)
        moments.m[turned] = c @ m
        basis = new
    return np.stack(out)


def apollo(grads, due, *, basis, scale, tensor, growth, b1, b2, eps):
    """The raw gradient, scaled as Adam scales its projection by ``basis(t)``."""
    limit = Growth(growth)

    def lift(g, p, r, step):
        axis = None if tensor else 0
        phi = np.linalg.norm(step, axis=axis) / np.linalg.norm(r, axis=axis)
        return scale * limit.limit(g * phi)

    draw = lambda g, p, m, t: basis(t)
    return projected_adam(grads, due, draw, Adam(b1, b2, eps), lift=lift)
