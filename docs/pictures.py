"""The pictures of the README, from real runs: ``python docs/pictures.py``, two minutes.

``recovery_video.png`` comes from ``benchmarks/recovery_video.py``, which needs the clip.
"""

import re
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import optax

import lrjax


HERE = Path(__file__).parent
CONTEXT, EMBEDDING, WIDTH, BATCH, STEPS, EVERY = 16, 16, 256, 64, 400, 20
RATES = np.logspace(-3, -1.5, 4, dtype=np.float32)
SEEDS = np.arange(3)
METHODS = {
    "Adam": optax.adam,
    "GaLore": lambda rate: lrjax.galore(rate, 1 / 8, refresh_every=50),
    "subspace_adam": lambda rate: lrjax.subspace_adam(rate, 1 / 8),
}


class Characters(eqx.Module):
    """The next character from the sixteen before it."""

    embed: jax.Array
    layers: list[jax.Array]
    head: jax.Array

    def __init__(self, alphabet, key):
        keys = jr.split(key, 5)
        self.embed = jr.normal(keys[0], (alphabet, EMBEDDING)) / 4
        self.layers = [jr.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys[1:4]]
        self.head = jr.normal(keys[4], (alphabet, WIDTH)) / WIDTH

    def __call__(self, codes):
        """Logits ``(windows, letters)``."""
        x = self.embed[codes].reshape(-1, CONTEXT * EMBEDDING)
        for layer in self.layers:
            x = x + jax.nn.gelu(x @ layer.T)
        return x @ self.head.T


def loss(model, windows):
    """Nats a character."""
    logits = model(windows[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1]))


def cut(codes, starts):
    """Windows of the text, one a row."""
    return codes[starts[:, None] + jnp.arange(CONTEXT + 1)]


def train(codes, held_out, *, method, alphabet, rate, seed):
    """The held-out loss, every twenty steps."""
    k_model, k_data = jr.split(jr.key(seed))
    model = Characters(alphabet, k_model)
    tx = METHODS[method](rate)

    def step(carry, key):
        model, state = carry
        starts = jr.randint(key, (BATCH,), 0, len(codes) - CONTEXT)
        grads = jax.grad(loss)(model, cut(codes, starts))
        updates, state = tx.update(grads, state, model)
        return (optax.apply_updates(model, updates), state), None

    def stretch(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, loss(carry[0], held_out)

    keys = jr.split(k_data, (STEPS // EVERY, EVERY))
    return jax.lax.scan(stretch, (model, tx.init(model)), keys)[1]


def training() -> None:
    """Loss curves of three optimizers, each at its best rate, and their bytes."""
    text = "".join(topics.values())
    letters = np.array(sorted(set(text)))
    codes = jnp.asarray(np.searchsorted(letters, list(text)).astype(np.int32))
    split = len(codes) * 9 // 10
    starts = jnp.arange(split, len(codes) - CONTEXT - 1, 40)
    held_out = cut(codes, starts)
    model = jax.eval_shape(lambda key: Characters(len(letters), key), jr.key(0))

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.4, 3.1), layout="constrained", width_ratios=(2, 1)
    )
    steps = np.arange(EVERY, STEPS + 1, EVERY)
    for index, name in enumerate(METHODS):
        one = lambda codes, held_out, *, rate, seed, name=name: train(
            codes, held_out, method=name, alphabet=len(letters), rate=rate, seed=seed
        )
        grid = {"rate": RATES, "seed": SEEDS}
        runs = lrjax.sweep(one, grid, codes[:split], held_out, progress=False)
        curves = runs.to_dataarray().values.reshape(len(RATES), len(SEEDS), -1)
        best = np.nanargmin(curves[:, :, -1].mean(axis=1))
        low, mean, high = (f(curves[best], axis=0) for f in (np.min, np.mean, np.max))
        left.plot(steps, mean, label=f"{name}, rate {RATES[best]:.0e}")
        left.fill_between(steps, low, high, alpha=0.2)
        report = lrjax.metrics.memory_report(model, METHODS[name](1e-3))
        right.barh(index, report.state_bytes / 1e6)
        print(f"{name}: rate {RATES[best]:.1e}, loss {mean[-1]:.3f}")
    left.set(xlabel="step", ylabel="held-out loss, nats a character")
    left.legend()
    right.set(xlabel="optimizer state, MB", yticks=range(len(METHODS)))
    right.set_yticklabels(list(METHODS))
    right.invert_yaxis()
    figure.savefig(HERE / "training.png", dpi=100)


def sweep() -> None:
    """The final loss of the README's ``train``, on a finer grid."""
    text = (HERE.parent / "README.md").read_text()
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, scope)
    arguments = [scope[name] for name in ("params", "frozen", "model", "x", "y")]
    grid = {
        "damping": np.logspace(-6, 2, 15, dtype=np.float32),
        "learning_rate": np.logspace(-3.5, 0, 15, dtype=np.float32),
    }
    final = lrjax.sweep(scope["train"], grid, *arguments)["losses"].isel(losses_0=-1)
    final.attrs["long_name"] = "loss after 100 steps"
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    norm = matplotlib.colors.LogNorm(vmax=min(float(final.max()), 1.0))
    final.plot(ax=axis, xscale="log", yscale="log", norm=norm, cmap="viridis_r")
    axis.set(xlabel="learning rate", ylabel="damping")
    figure.savefig(HERE / "sweep.png", dpi=100)
    print(final.min().item())


if __name__ == "__main__":
    sweep()
    training()
