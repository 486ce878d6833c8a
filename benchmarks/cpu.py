"""Choices for a CPU: attention head by head, the dtypes of computation and products, huge pages.

python benchmarks/cpu.py
python benchmarks/cpu.py --products
python benchmarks/cpu.py --pages

Prints how long XLA's attention takes beside attention head by head, and how long a training step of
configs/emoji.py takes in bfloat16 beside float32. Times are the smallest of several runs, which
alternate between the two sides.

--products compares ``denoiser.product_dtype`` "float32" and "bfloat16": in single products with
their gradients, in training steps of configs/emoji.py and of larger networks, and in what the
packaged model draws: of 200 captions of objects and 200 of people, the share whose true picture is
the nearest of all training pictures, as in ``emoji_retrieval``.

--pages prints how long a step takes in a process whose C library asks Linux for huge pages, beside
one that does not: the median of all steps of three processes of each kind, which take turns.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import emoji_retrieval

from configs import emoji
from vqd_jax.interop import pretrained
from vqd_jax.models import attention, linear
from vqd_jax.parallel import sharding
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import stage_two
from vqd_jax.training import task as task_lib

# Rows, inputs and outputs of products: the MLPs of a width of 64, 256 and 1024 (that of B).
PRODUCTS = ((2048, 64, 256), (2048, 256, 1024), (2048, 1024, 4096))
# (images, queries, keys, heads, head width) and what has them.
SIZES = {
    "self-attention of B, 1 image": (1, 1024, 1024, 16, 64),
    "self-attention of B, 4 images": (4, 1024, 1024, 16, 64),
    "cross-attention of B, 1 image": (1, 1024, 77, 16, 64),
    "64 tokens, 32 images": (32, 64, 64, 8, 32),
}


def fastest(functions, rounds: int) -> list[float]:
    """The smallest time of each function, in ms; compiling is not counted."""
    times = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if number:
                found.append(1e3 * (time.perf_counter() - start))
    return [min(found) for found in times]


def compare_attention() -> None:
    """``attend`` without a gradient, and ``jax.nn.dot_product_attention``."""
    print("| attention | XLA, ms | head by head, ms | faster |\n|---|---|---|---|")
    for name, (batch, queries, keys, heads, width) in SIZES.items():
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.normal(size=(batch, n, heads, width)), jnp.float32)
            for n in (queries, keys, keys)
        )
        ours, whole = jax.jit(attention.attend), jax.jit(jax.nn.dot_product_attention)
        slow, fast = fastest([lambda: whole(q, k, v), lambda: ours(q, k, v)], 20)  # noqa: B023
        print(f"| {name} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} times |")


def train_step(**denoiser):
    """A function that takes one more training step of a denoiser with these fields."""
    config = emoji.get_config()
    config.denoiser.update(denoiser)
    mesh = sharding.make_mesh(config)
    task = stage_two.DenoiserTask(config)
    step, shapes = task_lib.jit_step(task, mesh), stage_two.abstract_batch(config, mesh)
    batch = {key: np.ones(x.shape, x.dtype) for key, x in shapes.items()}
    state = task_lib.init_state(task, mesh)

    def run():
        nonlocal state
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        return metrics

    return run


def step_seconds(count: int = 10) -> list[float]:
    """Seconds of training steps, without the first two."""
    run, times = train_step(product_dtype="float32"), []
    for _ in range(count + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[2:]


def compare_pages() -> None:
    """Steps with small pages and with huge ones."""
    tunables = {"small": "", "huge": "glibc.malloc.hugetlb=1"}
    times = {pages: [] for pages in tunables}
    for _ in range(3):
        for pages, value in tunables.items():
            process = subprocess.run(
                [sys.executable, __file__, "--steps"],
                env=os.environ | {"GLIBC_TUNABLES": value},
                check=True,
                capture_output=True,
                text=True,
            )
            times[pages] += map(float, process.stdout.split())
    small, huge = (np.median(found) for found in times.values())
    print(
        f"training step of configs/emoji.py: {1e3 * small:.0f} ms with small pages, "
        f"{1e3 * huge:.0f} ms with huge pages, {small / huge:.2f} times as fast"
    )


def forward(x: jax.Array, kernel: jax.Array, kind: str) -> jax.Array:
    """A product whose inputs are rounded to ``kind``."""
    return linear.product(x, kernel, None, kind)


def with_gradients(x: jax.Array, kernel: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """The gradients of a product, which needs the product itself for their cotangent."""
    made, pull = jax.vjp(functools.partial(forward, kind=kind), x, kernel)
    return pull(made)


def compare_products() -> None:
    """The two dtypes of products: in time, and in what is drawn."""
    kinds = ("float32", "bfloat16")
    print(
        f"bfloat16 products on this processor: {linear.cpu_has_bfloat16()}; jax {jax.__version__}"
    )
    print("| rows, inputs, outputs | | float32, ms | bfloat16, ms | faster |")
    print("|---|---|---|---|---|")
    for rows, inputs, outputs in PRODUCTS:
        x, kernel = (jnp.ones(size, jnp.float32) for size in ((rows, inputs), (inputs, outputs)))
        for name, function in (("forward", forward), ("with gradients", with_gradients)):
            made = [jax.jit(functools.partial(function, kind=kind)) for kind in kinds]
            slow, fast = fastest([functools.partial(f, x, kernel) for f in made], 20)
            size = f"{rows}, {inputs}, {outputs}"
            print(f"| {size} | {name} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} times |")
    print("\n| training step | float32, ms | bfloat16, ms | faster |\n|---|---|---|---|")
    for layers, width in ((4, 64), (6, 128), (6, 256)):
        size = {"num_layers": layers, "width": width}
        slow, fast = fastest([train_step(product_dtype=kind, **size) for kind in kinds], 10)
        print(f"| {layers} layers of {width} | {slow:.0f} | {fast:.0f} | {slow / fast:.2f} times |")
    print("\n| drawn by the packaged model | float32 | bfloat16 | alike |\n|---|---|---|---|")
    found = {}
    for kind in kinds:
        loaded = pretrained.load_model("emoji")
        loaded.config.denoiser.product_dtype = kind
        found[kind] = emoji_retrieval.of_model(VQDiffusion(*loaded), 200)
    for name in found["float32"]:
        one, other = (found[kind][name] for kind in kinds)
        shares = " | ".join(emoji_retrieval.share(x) for x in (one, other))
        print(f"| {name} | {shares} | {emoji_retrieval.share(one == other)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", action="store_true", help="compare products alone")
    parser.add_argument("--pages", action="store_true", help="compare pages, and nothing else")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.steps:
        return print(*step_seconds())
    if flags.pages:
        return compare_pages()
    if flags.products:
        return compare_products()
    compare_attention()
    dtypes = ("bfloat16", "float32")
    slow, fast = fastest([train_step(dtype=x, product_dtype="float32") for x in dtypes], 5)
    print(
        f"\ntraining step of configs/emoji.py: bfloat16 {slow:.0f} ms, float32 {fast:.0f} ms; "
        f"bfloat16 takes {slow / fast:.1f} times as long (jax {jax.__version__})"
    )


if __name__ == "__main__":
    main()
