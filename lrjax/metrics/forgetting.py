from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int


class ContinualScores(NamedTuple):
    """What a model that learned tasks one after the other has, gained and lost.

    Means over tasks, in the unit of the accuracies; nan where no task is meant.

    Attributes:
        average_accuracy: at the end, of all tasks that were learned.
        forgetting: of those learned before the end, how far each is below its best so far.
        backward_transfer: of the same, how far each is above what it was when it had been
            learned: negative for what was forgotten.
        forward_transfer: of those learned after another one, how far each was above its
            baseline just before it began.
        worst_accuracy: the least that each came down to after it had been learned.
        stability_gap: how far the least lies below both ends, when it had been learned
            and at the end: what was lost on the way and is there again.
    """

    average_accuracy: Float[Array, ""]
    forgetting: Float[Array, ""]
    backward_transfer: Float[Array, ""]
    forward_transfer: Float[Array, ""]
    worst_accuracy: Float[Array, ""]
    stability_gap: Float[Array, ""]


def continual_scores(
    accuracy: Float[Array, "tasks times"],
    learned_at: Int[Array, " tasks"] | None = None,
    *,
    began_at: Int[Array, " tasks"] | None = None,
    baseline: ArrayLike | Float[Array, " tasks"] = 0.0,
) -> ContinualScores:
    """Accuracy, forgetting, transfer and stability of a model that learns task after task.

    ``a (tasks, times)`` holds the accuracy on every task at every time it was measured, at
    the end of each task or more often. With ``l_k`` the time when task k had been learned,
    ``b_k`` the last one before it began, and T the last of all, they are means of::

        average accuracy    a[k, T]                            of the learned
        forgetting          max_{t < T} a[k, t] − a[k, T]      of those with l_k < T
        backward transfer   a[k, T] − a[k, l_k]                of those with l_k < T
        forward transfer    a[k, b_k] − baseline_k             of those with b_k ≥ 0
        worst accuracy      min_{t ≥ l_k} a[k, t]              of those with l_k < T
        stability gap       min(a[k, l_k], a[k, T]) − min_{t ≥ l_k} a[k, t]    of the same

    Forgetting at its end does not see what a model loses when a task begins and regains by
    and by. The stability gap does, if the accuracy was measured often enough.

    Args:
        accuracy: a; higher is better. A loss may be handed over with its sign turned.
        learned_at: ``l_k``, negative for tasks that were not learned, which are left out.
            By default task k is learned at time k.
        began_at: ``b_k``; by default the latest of the ``l`` that is earlier than ``l_k``,
            and none for the first task.
        baseline: the accuracy on each task of a model that saw none, chance for instance.

    Returns:
        The scores; ``jax.vmap`` gives those of many runs.

    Raises:
        ValueError: for shapes that do not fit, or tasks without a time of their own.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> accuracy = jnp.array([[0.9, 0.4, 0.8], [0.2, 0.9, 0.7], [0.1, 0.3, 0.9]])
        >>> scores = lrjax.metrics.continual_scores(accuracy, baseline=0.1)
        >>> print(*(f"{name} {x:.2f}" for name, x in scores._asdict().items()), sep=", ")
        average_accuracy 0.80, forgetting 0.15, backward_transfer -0.15, \
forward_transfer 0.15, worst_accuracy 0.55, stability_gap 0.20

    Reference:
        A. Chaudhry, P. K. Dokania, T. Ajanthan, P. H. S. Torr, "Riemannian walk for
        incremental learning: understanding forgetting and intransigence" (2018), arXiv
        1801.10112; transfer: D. Lopez-Paz, M. Ranzato, "Gradient episodic memory for
        continual learning" (2017), arXiv 1706.08840; the gap and the worst accuracy: M. De
        Lange, G. van de Ven, T. Tuytelaars, "Continual evaluation for lifelong learning:
        identifying the stability gap" (2023), arXiv 2205.13452. Special case: a model that
        forgets nothing has a forgetting, backward transfer and gap of zero.
    """
    if accuracy.ndim != 2 or 0 in accuracy.shape:
        raise ValueError(
            "continual_scores needs accuracies (tasks, times), at least one of each, got "
            f"{accuracy.shape}."
        )
    tasks, times = accuracy.shape
    if learned_at is None:
        if tasks != times:
            raise ValueError(
                f"continual_scores was given {tasks} tasks at {times} times: say with "
                "learned_at at which of these each task had been learned."
            )
        learned_at = jnp.arange(tasks)
    for name, given in (("learned_at", learned_at), ("began_at", began_at)):
        if given is not None and given.shape != (tasks,):
            raise ValueError(
                f"continual_scores needs one {name} for each of the {tasks} tasks, got "
                f"shape {given.shape}."
            )
    learned = learned_at >= 0
    if began_at is None:
        earlier = learned[None] & (learned_at[None] < learned_at[:, None])
        began_at = jnp.max(jnp.where(earlier, learned_at[None], -1), axis=1)
    last = accuracy[:, -1]
    after = jnp.arange(times)[None] >= learned_at[:, None]
    worst = jnp.min(jnp.where(after, accuracy, jnp.inf), axis=1)
    # With one time there is none before the last; no task is then meant.
    best = jnp.max(accuracy[:, : max(times - 1, 1)], axis=1)
    at = lambda index: accuracy[jnp.arange(tasks), jnp.clip(index, 0, times - 1)]
    then = at(learned_at)
    old = learned & (learned_at < times - 1)
    return ContinualScores(
        average_accuracy=_mean(last, learned),
        forgetting=_mean(best - last, old),
        backward_transfer=_mean(last - then, old),
        forward_transfer=_mean(
            at(began_at) - jnp.broadcast_to(baseline, (tasks,)), learned & (began_at >= 0)
        ),
        worst_accuracy=_mean(worst, old),
        stability_gap=_mean(jnp.minimum(then, last) - worst, old),
    )


def _mean(x: Float[Array, " k"], where: Bool[Array, " k"]) -> Float[Array, ""]:
    """The mean of some of the numbers, nan of none."""
    return jnp.sum(jnp.where(where, x, 0)) / jnp.sum(where)
