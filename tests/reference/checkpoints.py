"""A learning rate that is reduced at checkpoints, from lists of all that was seen."""


class Reduced:
    """Auto-PGD's rule, for the scores of a training: as its two conditions are written."""

    def __init__(self, checkpoints, factor, progress):
        self.w, self.factor, self.rho = list(checkpoints), factor, progress
        self.scores, self.rates, self.params = [], [1.0], []

    def see(self, score, params):
        """One score; what the parameters go back to, or None."""
        self.scores.append(score)
        self.params.append(params)
        t = len(self.scores) - 1
        rate = self.rates[-1]
        self.rates.append(rate)  # rates[t + 1] is that after the score t
        if t == 0 or t not in self.w:
            return None
        before = self.w[self.w.index(t) - 1]
        gains = sum(self.scores[i + 1] > self.scores[i] for i in range(before, t))
        few = gains < self.rho * (t - before)
        # The rate in force when the last checkpoint was reached, and the one now.
        same = self.rates[before] == rate
        best = lambda k: max(self.scores[: k + 1])
        if not few and not (same and best(before) == best(t)):
            return None
        self.rates[-1] = rate * self.factor
        return self.params[self.scores.index(best(t))]
