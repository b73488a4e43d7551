"""How fast is a LoRA step on a GPU, beside full fine-tuning and PEFT on PyTorch?

An encoder with MiniLM's sizes and one of 24 layers of width 1024, with random weights, in
float32 with TF32 products and in bfloat16. Forward, backward and Adam, arrays donated:
the median of steps that are waited for, the mean of steps that are not, and the bytes that
are held at the peak (by XLA's plan of the program, by PyTorch's count).

``python benchmarks/lora_gpu.py [OUT.json] [--seconds 170] [--small]``: each library is a
process of its own, and the file is written anew after every measurement. What fails or is
not reached is named in its row. ``--small`` tries everything on tiny encoders on a CPU.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


STARTED = time.monotonic()
RESULTS = Path(__file__).parent / "results"
# Names and shares of the time. Each stops by itself; the next ones get what it leaves.
LIBRARIES = {"lrjax": 0.5, "torch": 0.5, "torch.compile": 1.0}
REPEATS, WARM, RANK, RATE = 25, 5, 8, 1e-3
SIZES = {  # depth, width, heads, feed-forward, vocabulary, positions; batch, length
    "MiniLM": ((6, 384, 12, 1536, 30522, 512), (16, 64)),
    "24 x 1024": ((24, 1024, 16, 4096, 30522, 512), (16, 256)),
}
SMALL = {"small": ((2, 32, 2, 64, 100, 16), (2, 8))}
QUERY_VALUE = ("query", "value")
STEPS = {  # what is adapted, by which method; dtype of the factors, if not the model's
    "LoRA all": ("LoRA", None, None),
    "LoRA q, v": ("LoRA", QUERY_VALUE, None),
    "DoRA all": ("DoRA", None, None),
    "full": (None, None, None),
    "LoRA all, float32 factors": ("LoRA", None, "float32"),
}


def cases(sizes):
    """Size and dtype, what matters most first."""
    return [(size, dtype) for dtype in ("bfloat16", "tf32") for size in sizes]


def steps_of(dtype):
    """Those that differ: factors in float32 are nothing new beside such a model."""
    return [name for name in STEPS if dtype == "bfloat16" or "float32" not in name]


def seconds_of(run, wait):
    """Medians of steps one by one, and the mean of steps in a row, warm."""
    for _ in range(WARM):
        run()
    wait()
    single = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        wait()
        single.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    wait()
    together = (time.perf_counter() - start) / REPEATS
    return {
        "milliseconds": 1e3 * statistics.median(single),
        "in a row, ms": 1e3 * together,
        "fastest, ms": 1e3 * min(single),
    }


class JaxLibrary:
    """lrjax, and full fine-tuning in JAX."""

    def __init__(self, sizes, size, dtype):
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import jax.random as jr

        from lrjax._tour import encoder

        def fused(query, key, value, mask):
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                key_value_seq_lengths=jnp.sum(mask, axis=1, dtype=jnp.int32),
                implementation="cudnn",
            )

        dtype = jnp.dtype("float32" if dtype == "tf32" else dtype)
        cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
        numbers, shape = sizes[size]
        numbers = encoder.Sizes(*numbers)
        keys = jr.split(jr.key(0), 3)
        make = lambda attend: lambda key: encoder.Encoder(key, numbers, attend)
        model = eqx.filter_jit(make(encoder.attend))(keys[0])
        self.model = jax.tree.map(cast, model)
        other = eqx.filter_eval_shape(make(fused), keys[0])
        self.fused = jax.tree.structure(other).unflatten(jax.tree.leaves(self.model))
        ids = jr.randint(keys[1], shape, 0, numbers.vocabulary)
        target = jr.normal(keys[2], (shape[0], numbers.width), dtype)
        self.data = (ids, jnp.ones_like(ids), target)
        self.half = dtype == jnp.bfloat16

    def prepare(self, names):
        """Thunks that finish building a step; the compilations run side by side."""
        with ThreadPoolExecutor(4) as pool:
            jobs = {}
            for name in names:
                jobs[name] = pool.submit(self.compiled, name, self.model)
                if self.half and name in ("LoRA all", "full"):
                    job = pool.submit(self.compiled, name, self.fused)
                    jobs[f"{name}, cuDNN attention"] = job
        return {name: job.result for name, job in jobs.items()}

    def compiled(self, name, model):
        """The step, compiled, and all its arguments."""
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import jax.random as jr
        import optax

        import lrjax

        method, where, dtype = STEPS[name]
        where = None if where is None else list(where)
        arrays, static = eqx.partition(model, eqx.is_inexact_array)
        tx = optax.adam(RATE)
        if method is None:
            params, rest = jax.tree.map(jnp.copy, arrays), None
            assemble = lambda params, rest, arrays: eqx.combine(params, static)
        else:
            kind = getattr(lrjax, method)(RANK, dtype=dtype)
            adapt = lambda arrays, key: lrjax.partition(
                lrjax.adapt(eqx.combine(arrays, static), kind, where=where, key=key)
            )
            params, rest = eqx.filter_jit(adapt)(arrays, jr.key(1))
            assemble = lambda params, rest, arrays: lrjax.bind(
                eqx.combine(arrays, static), eqx.combine(params, rest)
            )

        def step(params, state, rest, arrays, ids, mask, target):
            def loss(params):
                out = assemble(params, rest, arrays)(ids, mask)
                return jnp.mean(jnp.square(out - target).astype(jnp.float32))

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        given = (rest, None if method is None else arrays, *self.data)
        state = tx.init(params)
        start = time.perf_counter()
        function = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, *given)
        function = function.compile()
        return function, params, state, given, time.perf_counter() - start

    def measure(self, built):
        """The row of a step."""
        import jax

        function, params, state, given, compile_seconds = built
        now = [params, state, None]
        count = sum(x.size for x in jax.tree.leaves(params))

        def run():
            now[:] = function(*now[:2], *given)

        run()
        loss = float(now[2])
        row = seconds_of(run, lambda: jax.block_until_ready(now))
        plan = function.memory_analysis()
        held = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        held += plan.output_size_in_bytes - plan.alias_size_in_bytes
        return {
            **row,
            "peak MB": held / 1e6,
            "temporary MB": plan.temp_size_in_bytes / 1e6,
            "Gflop": function.cost_analysis().get("flops", 0) / 1e9,
            "compile_seconds": compile_seconds,
            "trained": count,
            "loss": loss,
        }


class TorchLibrary:
    """PEFT, and full fine-tuning in PyTorch, as it comes or compiled."""

    modes = ({"": None}, {", compiled": "default", ", CUDA graphs": "reduce-overhead"})

    def __init__(self, sizes, size, dtype, compiled=False):
        import torch
        import transformers

        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.float32 if dtype == "tf32" else torch.bfloat16
        (depth, width, heads, feedforward, vocabulary, positions), shape = sizes[size]
        self.config = transformers.BertConfig(
            num_hidden_layers=depth,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=feedforward,
            vocab_size=vocabulary,
            max_position_embeddings=positions,
        )
        self.ids = torch.randint(0, vocabulary, shape, device=self.device)
        self.target = torch.randn(shape[0], width, device=self.device, dtype=self.dtype)
        self.compiled = compiled

    def prepare(self, names):
        """Thunks that build a step."""
        jobs = {}
        for name in names[:1] if self.compiled else names:
            for suffix, mode in self.modes[self.compiled].items():
                jobs[name + suffix] = lambda name=name, mode=mode: (name, mode)
        return jobs

    def model(self, name):
        """The model, and what of it is trained."""
        import peft
        import transformers

        method, where, dtype = STEPS[name]
        model = transformers.BertModel(self.config, add_pooling_layer=False)
        model = model.to(self.device, self.dtype)
        if method is not None:
            config = peft.LoraConfig(
                r=RANK,
                lora_alpha=RANK,
                use_dora=method == "DoRA",
                target_modules=list(where or []) or r".*encoder\..*(query|key|value|dense)",
            )
            model = peft.get_peft_model(
                model, config, autocast_adapter_dtype=dtype is not None
            )
        return model.eval()  # without BERT's dropout, as ours

    def measure(self, built):
        """The row of a step."""
        import torch

        name, mode = built
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.empty_cache()
        model = self.model(name)
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(trained, RATE, fused=True)
        mask = torch.ones_like(self.ids)

        def loss_of():
            hidden = model(input_ids=self.ids, attention_mask=mask).last_hidden_state
            return ((hidden.mean(dim=1) - self.target) ** 2).float().mean()

        function = loss_of if mode is None else torch.compile(loss_of, mode=mode)

        def run():
            adam.zero_grad()
            loss = function()
            loss.backward()
            adam.step()
            return loss

        wait = torch.cuda.synchronize if cuda else lambda: None
        start = time.perf_counter()
        loss = run().item()
        first = time.perf_counter() - start
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        row = seconds_of(run, wait)
        peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else None
        return {
            **row,
            "peak MB": peak,
            "compile_seconds": first,
            "trained": sum(p.numel() for p in trained),
            "loss": loss,
        }


def child(arguments, sizes):
    """All measurements of one library, until its time is up."""
    record = Record(arguments.out)
    library = arguments.library
    if library == "lrjax":
        from _harness import environment

        found = environment("torch", "peft", "transformers")
        if found["platform"] == "cpu" and not arguments.small:
            sys.exit("JAX finds no GPU")
        record.content["environment"] = found
        record.write()
    for size, dtype in cases(sizes):
        place = {"library": library, "size": size, "dtype": dtype}
        names = steps_of(dtype)
        if time.monotonic() - STARTED > arguments.seconds:
            record.add({**place, "step": "all", "failed": "not reached in time"})
            continue
        try:
            if library == "lrjax":
                bench = JaxLibrary(sizes, size, dtype)
            else:
                bench = TorchLibrary(sizes, size, dtype, library != "torch")
            jobs = bench.prepare(names)
        except Exception as error:
            record.add({**place, "step": "all", "failed": said(error)})
            continue
        for name, job in jobs.items():
            row = {**place, "step": name}
            if time.monotonic() - STARTED > arguments.seconds:
                record.add({**row, "failed": "not reached in time"})
                continue
            try:
                record.add({**row, **bench.measure(job())})
            except Exception as error:
                record.add({**row, "failed": said(error)})


def said(error):
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]


class Record:
    """The results file, written anew with every row."""

    def __init__(self, path):
        self.path = Path(path)
        empty = {"environment": {}, "rows": [], "bounds": []}
        self.content = json.loads(self.path.read_text()) if self.path.exists() else empty

    def add(self, row):
        self.content["rows"].append(row)
        self.write()
        short = lambda x: f"{x:.4g}" if isinstance(x, float) else x
        print("  ".join(f"{k}={short(v)}" for k, v in row.items()), flush=True)

    def write(self):
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=2) + "\n")
        part.replace(self.path)


def bounds(rows):
    """What has to hold, of what was measured."""
    from _harness import bound

    def best(*place):
        """Milliseconds with the attention that is faster."""
        at = lambda row: (row["library"], row["size"], row["dtype"])
        of = lambda row: row["step"].split(", cuDNN")[0]
        found = [r for r in rows if (*at(r), of(r)) == place and "failed" not in r]
        return min((r["milliseconds"] for r in found), default=None)

    found = []
    for size, dtype in cases(SIZES):
        claims = [
            (f"PEFT on PyTorch, {step}", ("torch", step), step, 1)
            for step in ("LoRA all", "LoRA q, v", "DoRA all")
        ]
        claims.append(
            ("full fine-tuning in JAX, LoRA all", ("lrjax", "full"), "LoRA all", 1.5)
        )
        for name, (library, step), own, least in claims:
            other, ours = best(library, size, dtype, step), best("lrjax", size, dtype, own)
            if other and ours:
                claim = f"times faster than {name}, {size} in {dtype}"
                found.append(bound(claim, other / ours, at_least=least))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?")
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--library", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library:
        child(arguments, SMALL if arguments.small else SIZES)
        return

    if arguments.out is None:
        if shutil.which("nvidia-smi") is None:
            print("nothing is measured: there is no GPU")
            return
        arguments.out = str(RESULTS / "lora_gpu.json")
    Path(arguments.out).unlink(missing_ok=True)
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    for library, share in LIBRARIES.items():
        left = arguments.seconds - (time.monotonic() - STARTED)
        # -P: transformers imports a package `kernels`, and would find our benchmark.
        alone = ["-P"] * (library != "lrjax")
        command = [sys.executable, *alone, __file__, arguments.out, f"--library={library}"]
        # The last measurement begins before the time is up, and has to end some time.
        command += [f"--seconds={share * left - 10}", *["--small"] * arguments.small]
        try:
            subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path}, timeout=share * left + 15
            )
        except subprocess.TimeoutExpired:
            print(f"{library} took too long and was ended", flush=True)
    record = Record(arguments.out)
    record.content["bounds"] = bounds(record.content["rows"])
    record.write()


if __name__ == "__main__":
    main()
