"""Which ranks and numbers the published methods keep, step by step, slowly, in float64."""

import math
from fractions import Fraction

import numpy as np


def soft_threshold(x, level):
    """The minimizer of ``½ (y − x)² + level |y|``, number by number."""
    return np.array([math.copysign(max(abs(v) - level, 0), v) for v in x])


def sora_code(x, level):
    """The three lines of Ding et al.'s optimizer."""
    x = x.copy()
    x[x > level] -= level
    x[x < -level] += level
    x[np.abs(x) < level] = 0
    return x


def adalora_budget(step, total, target, begin, end):
    """Zhang et al. (2023): the number of triplets, in exact arithmetic."""
    if step <= begin:
        return total
    if step >= end:
        return target
    left = 1 - Fraction(step - begin, end - begin)
    return math.floor(target + (total - target) * left**3)


class AdaLoRA:
    """The allocator as PEFT writes it, for triplets ``(E (r,), A (r, n), B (m, r))``."""

    def __init__(self, target, begin, end, every, b=0.85):
        self.rule = (target, begin, end, every)
        self.b, self.mean, self.deviation, self.pattern = b, {}, {}, None

    def step(self, t, params, grads):
        """After the optimizer's step ``t``: zero some of the E in place."""
        target, begin, end, every = self.rule
        total = sum(len(p["E"]) for p in params.values())
        if t < end:
            self._observe(params, grads)
        if t > end:
            for path, p in params.items():
                p["E"][~self.pattern[path]] = 0
            return
        budget = adalora_budget(t, total, target, begin, end)
        if (t > begin and t % every == 0) or t == end:
            self._mask(params, total - budget)

    def _observe(self, params, grads):
        for path, p in params.items():
            for name in p:
                key, i = (path, name), np.abs(p[name] * grads[path][name])
                old = self.mean.get(key, 0 * i)
                self.mean[key] = self.b * old + (1 - self.b) * i
                old = self.deviation.get(key, 0 * i)
                gap = np.abs(i - self.mean[key])
                self.deviation[key] = self.b * old + (1 - self.b) * gap

    def _mask(self, params, gone):
        score = lambda path, name: self.mean[path, name] * self.deviation[path, name]
        scores = {
            path: score(path, "E")
            + score(path, "A").mean(axis=1)
            + score(path, "B").mean(axis=0)
            for path in params
        }
        level = -1.0
        if gone > 0:
            level = np.sort(np.concatenate(list(scores.values())))[gone - 1]
        self.pattern = {path: s > level for path, s in scores.items()}
        for path, p in params.items():
            p["E"][~self.pattern[path]] = 0


def roselora_keep(score, share):
    """Wang et al. (2024): in each column, the numbers among the largest ``share``."""
    keep = np.zeros(score.shape, bool)
    count = max(math.ceil(Fraction(share) * len(score)), 1)
    for k in range(score.shape[1]):
        keep[np.argsort(-score[:, k], kind="stable")[:count], k] = True
    return keep


class AFLoRA:
    """Liu et al. (2024): the pruner of their code, for a list of tensors."""

    def __init__(self, count, window, b1=0.85, b2=0.95):
        self.window, self.b1, self.b2 = window, b1, b2
        self.average, self.mean, self.deviation = ([0.0] * count for _ in range(3))
        self.frozen = [False] * count

    def step(self, t, params, grads, share):
        """After the optimizer's step ``t``."""
        local = t % self.window
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if self.frozen[i]:
                continue
            sample = np.abs(np.sign(p) * g)
            if local == 0:
                full = self.average[i]
                self.mean[i] = self.b1 * self.mean[i] + (1 - self.b1) * full
                gap = np.abs(full - self.mean[i])
                self.deviation[i] = self.b2 * self.deviation[i] + (1 - self.b2) * gap
                self.average[i] = sample
            else:
                self.average[i] = (self.average[i] * local + sample) / (local + 1)
        if local == 0 or share <= 0:
            self._freeze(share)

    def _freeze(self, share):
        scores = {
            i: self.mean[i] * self.deviation[i]
            for i, stopped in enumerate(self.frozen)
            if not stopped
        }
        numbers = np.sort(np.concatenate([np.ravel(s) for s in scores.values()] or [[]]))
        k = math.floor(len(numbers) * (1 - share))
        if k > 0:
            for i, s in scores.items():
                self.frozen[i] = bool(np.mean(s) < numbers[k - 1])


def alora_round(masks, scores, amount):
    """Liu et al. (2024): lists of kept columns, one for each module."""
    ranked = sorted(
        (scores[m][k], m, k)
        for m, mask in enumerate(masks)
        for k in range(len(mask))
        if mask[k]
    )
    masks = [list(mask) for mask in masks]
    means = [
        np.mean([s for s, on in zip(scores[m], mask, strict=True) if on] or [0])
        for m, mask in enumerate(masks)
    ]
    hit = set()
    for _, m, k in ranked[:amount]:
        masks[m][k] = False
        hit.add(m)
    given = dict.fromkeys(set(range(len(masks))) - hit, 0)
    for _ in range(amount):
        open_to = [m for m in given if not all(masks[m])]
        if not open_to:
            break
        m = min(open_to, key=lambda m: (given[m], -means[m]))
        masks[m][masks[m].index(False)] = True
        given[m] += 1
    return masks


class IncreLoRA:
    """Zhang et al. (2023): the number of ranks of each module, by their scores."""

    def __init__(self, ranks, target, top, columns, largest):
        self.ranks, self.rule = list(ranks), (target, top, columns, largest)

    def grow(self, scores):
        target, top, columns, largest = self.rule
        total = sum(self.ranks)
        if total >= target:
            return
        able = [m for m, r in enumerate(self.ranks) if r + columns <= largest]
        count = min(top, target - total)
        chosen = sorted(able, key=lambda m: -scores[m])[:count]
        for m in chosen:
            self.ranks[m] += columns
