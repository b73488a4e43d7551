"""The pool of clusters as lists, one point after the other."""

import numpy as np


class Clusters:
    """The rule with lists of points, and with merging as an option."""

    def __init__(self, clusters, size, merge=False):
        self.most, self.size, self.merge = clusters, size, merge
        self.clusters = []  # each a list of (time, point), the oldest first
        self.time = 0

    def means(self):
        return [np.mean([z for _, z in c], axis=0) for c in self.clusters]

    def add(self, z):
        entry = (self.time, z)
        self.time += 1
        if len(self.clusters) == self.most and self.merge:
            means = self.means()
            gaps = {
                (i, j): np.sum((means[i] - means[j]) ** 2)
                for i in range(self.most)
                for j in range(i + 1, self.most)
            }
            i, j = min(gaps, key=gaps.get)
            if min(np.sum((m - z) ** 2) for m in means) > gaps[i, j]:
                both = sorted(self.clusters[i] + self.clusters[j], key=lambda e: e[0])
                self.clusters[i] = both[-self.size :]
                self.clusters[j] = [entry]
                return
        if len(self.clusters) < self.most:
            self.clusters.append([entry])
            return
        nearest = np.argmin([np.sum((m - z) ** 2) for m in self.means()])
        self.clusters[nearest].append(entry)
        del self.clusters[nearest][: -self.size]

    def times(self):
        return [[t for t, _ in c] for c in self.clusters]
