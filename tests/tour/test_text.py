import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax._tour.text as part
from lrjax._tour import docstrings, encoder
from tests.helpers import assert_close


@pytest.mark.slow
def test_sentences_are_balanced_and_apart():
    train, test = docstrings.load(20, 10)
    assert [train.labels.count(kind) for kind in (0, 1)] == [20, 20]
    assert [test.labels.count(kind) for kind in (0, 1)] == [10, 10]
    lower = [text.lower() for text in train.texts + test.texts]
    assert len(set(lower)) == len(lower)
    assert all(5 <= len(text.split()) <= 60 for text in lower)
    assert docstrings.load(20, 10) == (train, test)


def test_without_the_model_the_part_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "model_directory", lambda: None)
    report = part.run(tmp_path, quick=True)
    assert encoder.INSTALL in report.skipped
    assert "--no-deps" in report.skipped
    assert not report.checks


def test_embeddings_equal_the_reference_and_padding_does_not_matter():
    directory = encoder.model_directory()
    if directory is None:
        pytest.skip(f"the pretrained model is not installed: {encoder.INSTALL}")
    model = encoder.load_encoder(directory)
    texts, want = encoder.reference()
    for length in (41, 64):
        tokenizer = encoder.load_tokenizer(directory, length)
        got = part.embed(model, *encoder.tokenize(tokenizer, texts))
        got = got / np.linalg.norm(got, axis=1, keepdims=True)
        assert np.max(np.abs(got - want)) < 1e-5


@pytest.mark.slow
def test_a_text_is_embedded_alike_in_any_batch_and_padding(getkey):
    sizes = encoder.Sizes(2, 8, 2, 16, 20, 12)
    model = encoder.Encoder(getkey(), sizes)
    ids = jax.random.randint(getkey(), (3, 6), 0, sizes.vocabulary)
    mask = jnp.ones_like(ids)
    whole = model(ids, mask)
    padded = [jnp.pad(x[1:2], ((0, 0), (0, 3))) for x in (ids, mask)]
    assert_close(model(*padded), whole[1:2], condition=100.0)
