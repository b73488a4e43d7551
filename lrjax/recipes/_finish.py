from typing import cast

import optax
from jaxtyping import ArrayLike


def finish(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """Put decoupled weight decay and the learning rate behind a direction."""
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    weight = cast(optax.ScalarOrSchedule, weight_decay)
    return optax.chain(
        tx,
        optax.identity() if none else optax.add_decayed_weights(weight),
        optax.scale_by_learning_rate(learning_rate),
    )
