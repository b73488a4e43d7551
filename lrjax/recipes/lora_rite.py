import optax
from jaxtyping import ArrayLike

from .._arguments import checks_trees
from ..transforms import scale_by_gram, scale_by_matrix_adam
from ._common import DecayMask, adam, by_kind, decay_weights


@checks_trees
def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    max_norm: ArrayLike = 1.0,
    conserve: bool = False,
    weight_decay: ArrayLike = 0.0,
    mask: DecayMask = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE: Adam whose trajectory does not depend on how the product is split.

    For each factor, with an orthonormal basis ``Q = partner K`` of the span of the other
    one and ``Ḡ = G_factor K``, the gradient with respect to the matrix, restricted to Q::

        V ← b2 P V Pᵀ + (1 − b2) ḠᵀḠ / rows        P = Qᵀ Q_old, (r, r)
        M ← b1 M Pᵀ + (1 − b1) Ḡ (V^½ + eps)⁻¹
        factor ← factor − η (M Kᵀ + γ factor)

    with decays that correct the bias by themselves, see
    :func:`lrjax.scale_by_matrix_adam`. The first step moves the product by matrices with
    equal singular values. The state is that of Adam and two r × r matrices a pair.

    Departures from the official code: ``Q`` comes from a Cholesky factor of the Gram matrix
    in the place of a QR decomposition, which gives the same steps; there is no skipping of
    large gradients, which it takes for zero.

    Args:
        learning_rate: ``η``, a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment; zero is allowed.
        max_norm: the largest norm of all ``Ḡ`` together; longer ones are scaled down.
        conserve: see :func:`lrjax.scale_by_matrix_adam`.
        weight_decay: ``γ``, decoupled, of matrices but biases and scales of norms.
        mask: which leaves are decayed: a tree of bools, or a function from the parameters
            to one; by default matrices, but no bias and no scale of a norm.

    Returns:
        An optax optimizer; ``update`` needs ``params``. Leaves that are no LowRank nodes
        take steps of Adam.

    Raises:
        ValueError: as :func:`lrjax.scale_by_matrix_adam`.

    Example:
        >>> import jax.numpy as jnp, lrjax
        >>> x = lrjax.LowRank(jnp.zeros((2, 2)), jnp.array([[2.0, 1.0], [0.0, 3.0]]))
        >>> grad = lrjax.LowRank(jnp.array([[5.0, 0.0], [1.0, 7.0]]), jnp.zeros((2, 2)))
        >>> tx = lrjax.lora_rite(0.1, eps=0.0)
        >>> step, _ = tx.update(grad, tx.init(x), x)
        >>> print(jnp.linalg.svd(step.left @ x.right.T)[1].round(4))  # √2 · 0.1
        [0.1414 0.1414]

    Reference:
        J.-N. Yen et al., "LoRA done RITE: robust invariant transformation equilibration for
        LoRA optimization" (2024), arXiv 2410.20625. Special case: the first step is
        ``√rows`` times that of :func:`lrjax.lora_muon` on each side, up to its ½.
    """
    moments = optax.chain(
        optax.clip_by_global_norm(max_norm),  # pyright: ignore[reportArgumentType]
        scale_by_matrix_adam(b1, b2, eps, conserve=conserve),
    )
    decay = decay_weights(weight_decay, mask)
    of_pairs = optax.chain(scale_by_gram(phi=moments), decay)
    return by_kind(of_pairs, optax.chain(adam(b1, b2, eps), decay), learning_rate)
