from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Scalar

from .._batching import any_member
from ..linalg import working_dtype
from ..metrics import diagonal_fisher
from .plateau_detector import PlateauDetector


class Consolidation(eqx.Module):
    """Finds by itself when something has been learned, and what holds it in place.

    Elastic weight consolidation for a stream without tasks. It keeps the few samples with
    the highest losses, and watches the loss. On a plateau, which is the end of something,
    the squared gradients at these samples join the importance of each weight, the mean
    over all plateaus so far::

        Ω ← Ω + (1/h Σ_i (∇ loss_i(W))² − Ω) / k        at the k-th plateau
        penalty = ½ Σ Ω (W − W₀)²

    ``W₀`` are the weights at the last plateau. With an adapter they are those of the model
    it sits on, if it was folded into them then, and ``W`` those of the merged model: what
    is held is the function, and not the factors, which begin anew. So Online-LoRA is three
    calls: ``watch``, ``consolidate``, and :func:`lrjax.fold` with a period of one::

        own, due = own.watch(losses, batch)
        own = own.consolidate(loss, merged_weights, when=due)
        model, adapters, state = folds(jnp.where(due, step, 0), model, adapters, state)

    :class:`lrjax.adapters.Restart` merges the product, ``W ← W + s B A``, and begins with
    B = 0 and a new random A, whose gradients are not zero.

    Attributes:
        detector: of plateaus.
        samples: the hardest ones, a tree with a leading axis ``(h, …)``.
        losses: theirs, when they were last computed; ``-inf`` for none ``(h,)``.
        importance: Ω, a tree like the weights, in float32 or wider.
        plateaus: k, how many there were.

    Example:
        >>> import jax, jax.numpy as jnp, lrjax
        >>> loss = lambda w, x, y: (x @ w - y) ** 2 / 2
        >>> w, batch = jnp.zeros(2), (jnp.eye(2), jnp.array([2.0, 1.0]))
        >>> own = lrjax.continual.Consolidation.start(
        ...     w, (jnp.zeros(2), jnp.zeros([])), hardest=2, window=2)
        >>> for _ in range(20):
        ...     losses = jax.vmap(loss, (None, 0, 0))(w, *batch)
        ...     own, due = own.watch(losses, batch)
        ...     own = own.consolidate(loss, w, when=due)
        ...     w = w - 0.2 * jax.grad(lambda w: jnp.mean(jax.vmap(
        ...         loss, (None, 0, 0))(w, *batch)) + own.penalty(w, w))(w)
        >>> print(own.plateaus, own.importance.shape)
        1 (2,)

    Reference:
        X. Wei, G. Li, R. Marculescu, "Online-LoRA: task-free online continual learning via
        low rank adaptation" (2024), arXiv 2411.05663. There the importance is one of
        numbers of factors, which the next factors do not inherit. Special case: with a
        plateau at the end of each task it is online EWC with the mean of all Fisher
        informations, :func:`lrjax.add_anchor`.
    """

    detector: PlateauDetector
    samples: PyTree
    losses: Float[Array, "*b h"]
    importance: PyTree
    plateaus: Int[Array, "*b"]

    @staticmethod
    def start(
        weights: PyTree,
        sample: PyTree,
        *,
        hardest: int = 4,
        window: int = 5,
        level: ArrayLike = 0.5,
        spread: ArrayLike = 0.1,
    ) -> "Consolidation":
        """Before the first batch: nothing is important.

        Args:
            weights: those that are held, a tree of arrays.
            sample: one of the stream, a tree such as ``(x, y)``.
            hardest: h, how many samples are kept.
            window: of :class:`PlateauDetector`, as the next two.
            level: the share of the peak that a plateau lies below.
            spread: the share of the peak that losses on it differ by.

        Raises:
            ValueError: for less than one sample, or a window of less than two losses.
        """
        if hardest < 1:
            raise ValueError(
                f"Consolidation.start needs hardest >= 1 samples to keep, got {hardest}."
            )
        zeros = lambda x: jnp.zeros((hardest, *jnp.shape(x)), jnp.result_type(x))
        wide = lambda x: jnp.zeros(jnp.shape(x), working_dtype(jnp.result_type(x)))
        return Consolidation(
            PlateauDetector.start(window, level=level, spread=spread),
            jax.tree.map(zeros, sample),
            jnp.full(hardest, -jnp.inf),
            jax.tree.map(wide, weights),
            jnp.zeros([], jnp.int32),
        )

    def watch(
        self,
        losses: Float[Array, " b"],
        batch: PyTree,
        *,
        again: Float[Array, " h"] | None = None,
    ) -> tuple["Consolidation", Bool[Array, ""]]:
        """See a batch: keep its hardest samples, and say whether a plateau was reached.

        Args:
            losses: of each sample of the batch, at the present weights.
            batch: a tree like the sample, with a leading axis.
            again: the losses of the samples that are kept, at the present weights, where
                they are trained on as well; by default those of when they came.

        Raises:
            ValueError: for a batch that is no batch of such samples.
        """
        shapes = lambda tree, cut: [jnp.shape(x)[cut:] for x in jax.tree.leaves(tree)]
        if (
            jax.tree.structure(batch) != jax.tree.structure(self.samples)
            or shapes(batch, 1) != shapes(self.samples, 1)
            or {x[:1] for x in shapes(batch, 0)} != {losses.shape}
        ):
            raise ValueError(
                f"Consolidation.watch takes {losses.shape[0]} losses with a batch of as "
                f"many samples of shapes {shapes(self.samples, 1)}, got "
                f"{shapes(batch, 0)}."
            )
        kept = self.losses
        if again is not None:
            kept = jnp.where(jnp.isfinite(kept), again.astype(kept.dtype), kept)
        new = jnp.where(jnp.isfinite(losses), losses, -jnp.inf).astype(kept.dtype)
        hardest, chosen = lax.top_k(jnp.concatenate([kept, new]), len(kept))
        pick = lambda old, x: jnp.concatenate([old, x.astype(old.dtype)])[chosen]
        samples = jax.tree.map(pick, self.samples, batch)
        detector, due = self.detector.update(jnp.mean(losses))
        own = Consolidation(detector, samples, hardest, self.importance, self.plateaus)
        return own, due

    def consolidate(
        self,
        loss: Callable[..., Scalar],
        weights: PyTree,
        *,
        when: Bool[Array, ""] | bool = True,
    ) -> "Consolidation":
        """Take the importances of now into the mean, and forget the hard samples.

        The gradients are only computed where it is due, under ``vmap`` for any member.

        Args:
            loss: ``loss(weights, *sample)`` of one, a negative log-likelihood.
            weights: at which it is taken.
            when: whether to do it, from :meth:`watch`.
        """
        there = jnp.isfinite(self.losses)
        share = len(there) / jnp.maximum(jnp.sum(there), 1)
        number = self.plateaus + 1

        def counted(weights: PyTree, there: Array, *sample: Any) -> Array:
            return jnp.where(there, loss(weights, *sample), 0)

        def run(importance: PyTree) -> PyTree:
            fisher = diagonal_fisher(counted, weights, there, *self.samples)
            mean = lambda old, new: old + (share * new - old) / number
            return jax.tree.map(mean, importance, fisher)

        when = jnp.asarray(when)
        new = lax.cond(any_member(when), run, lambda old: old, self.importance)
        keep = lambda new, old: jnp.where(when, new, old)
        return Consolidation(
            self.detector,
            self.samples,
            keep(jnp.full_like(self.losses, -jnp.inf), self.losses),
            jax.tree.map(keep, new, self.importance),
            keep(number, self.plateaus),
        )

    def penalty(self, weights: PyTree, anchor: PyTree) -> Float[Array, ""]:
        """``½ Σ Ω (W − W₀)²``, to be added to the loss with a weight.

        Args:
            weights: W, of the merged model where there is an adapter.
            anchor: W₀, at the last plateau: of the model below the adapter.
        """

        def one(f, w, w0):
            away = w.astype(f.dtype) - lax.stop_gradient(w0).astype(f.dtype)
            return jnp.sum(f * away**2) / 2

        terms = jax.tree.leaves(jax.tree.map(one, self.importance, weights, anchor))
        return sum(terms, start=jnp.zeros([]))
