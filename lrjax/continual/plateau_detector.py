import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..linalg import working_dtype


class PlateauDetector(eqx.Module):
    """Says when a loss has come down and stays there, and waits for the next peak.

    Of the last n losses, their mean ``m`` and standard deviation ``s``, and of the highest
    mean ``h`` since the last plateau, there is a plateau when::

        m < level · h    and    s < spread · h

    Then it is silent until a mean rises above ``m + s`` of that plateau: something new has
    begun, and h is measured anew. Both thresholds are shares of the peak, so that nobody
    has to know how large a loss is, or what a good one would be.

    Attributes:
        window: the last losses ``(n,)``, the latest last.
        seen: how many there were.
        peak: h.
        rearm: the mean that has to be exceeded after a plateau.
        armed: whether it waits for a plateau, not for a peak.
        level: the share of the peak that a plateau lies below.
        spread: the share of the peak that it moves by at most.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> detector = lrjax.continual.PlateauDetector.start(window=3)
        >>> fired = []
        >>> for value in (4.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.4, 0.4, 3.0, 3.0, 0.5, 0.4, 0.4):
        ...     detector, now = detector.update(jnp.array(value))
        ...     fired.append(int(now))
        >>> print(fired)
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]

    Reference:
        R. Aljundi, K. Kelchtermans, T. Tuytelaars, "Task-free continual learning" (2018),
        arXiv 1812.03596. The thresholds are numbers of the loss there. Special case: the
        answers are the same for any multiple of the loss.
    """

    window: Float[Array, "*b n"]
    seen: Int[Array, "*b"]
    peak: Float[Array, "*b"]
    rearm: Float[Array, "*b"]
    armed: Bool[Array, "*b"]
    level: Float[Array, "*b"]
    spread: Float[Array, "*b"]

    @staticmethod
    def start(
        window: int = 5,
        *,
        level: ArrayLike = 0.5,
        spread: ArrayLike = 0.1,
        dtype=jnp.float32,
    ) -> "PlateauDetector":
        """Before the first loss.

        Args:
            window: n, how many losses it looks at.
            level: the share of the peak that a plateau lies below.
            spread: the share of the peak that losses on it differ by, as a standard
                deviation; noisy losses of small batches need more.
            dtype: of the losses.

        Raises:
            ValueError: for a window of less than two.
        """
        if window < 2:
            raise ValueError(
                "PlateauDetector.start needs a window of at least two losses, got "
                f"{window}."
            )
        zero = jnp.zeros([], working_dtype(dtype))
        number = lambda x: jnp.asarray(x, zero.dtype)
        return PlateauDetector(
            window=jnp.zeros(window, zero.dtype),
            seen=jnp.zeros([], jnp.int32),
            peak=zero,
            rearm=zero,
            armed=jnp.array(True),
            level=number(level),
            spread=number(spread),
        )

    def update(self, loss: Float[Array, ""]) -> tuple["PlateauDetector", Bool[Array, ""]]:
        """The detector after one more loss, and whether a plateau was reached just now.

        A loss that is not finite is not seen.
        """
        loss = loss.astype(self.window.dtype)
        window = jnp.append(self.window[1:], loss)
        seen = self.seen + 1
        full = seen >= len(window)
        mean, std = jnp.mean(window), jnp.std(window)
        begun = full & ~self.armed & (mean > self.rearm)
        armed = self.armed | begun
        peak = jnp.where(begun, mean, jnp.where(full, jnp.maximum(self.peak, mean), 0))
        low = (mean < self.level * peak) & (std < self.spread * peak)
        reached = full & armed & low
        new = PlateauDetector(
            window,
            seen,
            peak,
            jnp.where(reached, mean + std, self.rearm),
            armed & ~reached,
            self.level,
            self.spread,
        )
        finite = jnp.isfinite(loss)
        keep = lambda new, old: jnp.where(finite, new, old)
        fields = ("window", "seen", "peak", "rearm", "armed")
        kept = {name: keep(getattr(new, name), getattr(self, name)) for name in fields}
        return PlateauDetector(**kept, level=self.level, spread=self.spread), (
            reached & finite
        )
