"""Moments at eight or four bits and bases at four bits a number, entry by entry."""

import numpy as np


def stored(x, signed, block, step, bits=8):
    """What is left of moments after they were stored on a step.

    Magnitudes are ``largest of the block · ρ^(k − top)``; a number goes to one of its two
    neighbours so that on average over the steps it stays what it was. The smallest
    magnitude stands for everything below it, and zero for zero. At four bits they are
    powers of two, and what has no sign has no zero either.
    """
    if bits == 4:
        ladder = 2.0 ** np.arange(-6 if signed else -15, 1)
    else:
        top, decades = (127, 5.0) if signed else (255, 7.0)
        ladder = 10.0 ** (decades * (np.arange(1, top + 1) - top) / top)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        size = largest_of_block(x, place, block)
        if size == 0 or (x[place] == 0 and (signed or bits == 8)):
            continue
        share, cut = abs(x[place]) / size, dither(place, x.shape, step)
        above = np.searchsorted(ladder, share * (1 - 1e-12))
        low, high = ladder[above - 1] if above else 0.0, ladder[above]
        kept = high if (share - low) / (high - low) > cut else low
        if not signed:
            kept = max(kept, ladder[0])
        out[place] = (-1 if x[place] < 0 else 1) * size * kept
    return out


def largest_of_block(x, place, block):
    """Blocks of about equal length along the longer of the last two axes."""
    axis = x.ndim - 2 if x.ndim > 1 and x.shape[-2] > x.shape[-1] else x.ndim - 1
    line = np.abs(x[(*place[:axis], slice(None), *place[axis + 1 :])])
    length = -(-len(line) // -(-len(line) // block))
    first = place[axis] // length * length
    return np.max(line[first : first + length])


def dither(place, shape, step):
    """An additive recurrence in fractions of 2³²: a Weyl sequence over steps and places."""
    index = np.ravel_multi_index(place[-2:], shape[-2:])
    mixed = (int(index) * 3242174889 + int(step) * 2654435769) % 2**32
    return (mixed // 2**8) / 2**24


def four_bit_basis(p, group):
    """Groups of entries, row by row, at 16 levels from their smallest to their largest."""
    flat, out = p.ravel(), []
    group = min(group, flat.size + flat.size % 2)
    for first in range(0, flat.size, group):
        x = flat[first : first + group]
        low, unit = x.min(), (x.max() - x.min()) / 15
        out.append(low + unit * np.round((x - low) / (unit if unit > 0 else 1)))
    return np.concatenate(out).reshape(p.shape)
