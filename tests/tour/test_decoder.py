import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax._tour import decoder
from tests.helpers import assert_close


# The opening words of a speech that every language model has read.
SPEECH = """Four score and seven years ago our fathers brought forth on this continent, a \
new nation, conceived in Liberty, and dedicated to the proposition that all men are \
created equal. Now we are engaged in a great civil war, testing whether that nation, or \
any nation so conceived and so dedicated, can long endure. We are met on a great \
battle-field of that war."""


@pytest.mark.slow
def test_no_logit_depends_on_what_follows(getkey):
    model = decoder.Decoder(getkey(), decoder.Sizes(2, 24, 6, 2, 16, 20))
    ids = jax.random.randint(getkey(), (7,), 0, 20)
    logits = eqx.filter_jit(model)
    assert_close(logits(ids.at[5:].set(0))[:5], logits(ids)[:5], condition=100.0)
    assert jnp.max(jnp.abs(logits(ids.at[0].add(1) % 20)[6] - logits(ids)[6])) > 1e-4


def test_queries_meet_keys_by_their_distance(getkey):
    x, y = jax.random.normal(getkey(), (2, 1, 3, 8))
    rotated = decoder.rotated(jnp.concatenate([x, y, x, y]))
    first, second = (jnp.sum(rotated[i] * rotated[i + 1]) for i in (0, 2))
    assert_close(second, first, condition=100.0)


@pytest.mark.slow
def test_the_real_model_gives_the_loss_of_transformers():
    if (file := decoder.model_file()) is None:
        pytest.skip(f"SmolLM2 is not here: {decoder.INSTALL}")
    model = decoder.load_decoder(file)
    ids = np.array(decoder.load_tokenizer(file).encode(SPEECH).ids)
    logs = jax.nn.log_softmax(eqx.filter_jit(lambda model, ids: model(ids))(model, ids))
    loss = -np.mean(np.take_along_axis(np.asarray(logs[:-1]), ids[1:, None], axis=1))
    assert abs(loss - 2.67981) < 1e-4
