"""Choices for a CPU: attention head by head, float32 as the compute dtype, and huge pages.

python benchmarks/cpu.py
python benchmarks/cpu.py --pages

Prints how long XLA's attention takes beside attention head by head, and how long a training step of
configs/emoji.py takes in bfloat16 beside float32. Times are the smallest of several runs, which
alternate between the two sides. --pages prints how long that step takes in a process whose C
library asks Linux for huge pages, beside one that does not: the median of all steps of three
processes of each kind, which take turns.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import emoji
from vqd_jax.models import attention
from vqd_jax.parallel import sharding
from vqd_jax.training import stage_two
from vqd_jax.training import task as task_lib

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


def train_step(dtype: str):
    """A function that takes one more training step with random codes."""
    config = emoji.get_config()
    config.denoiser.dtype = dtype
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
    run, times = train_step("float32"), []
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", action="store_true", help="compare pages, and nothing else")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.steps:
        return print(*step_seconds())
    if flags.pages:
        return compare_pages()
    compare_attention()
    slow, fast = fastest([train_step("bfloat16"), train_step("float32")], 5)
    print(
        f"\ntraining step of configs/emoji.py: bfloat16 {slow:.0f} ms, float32 {fast:.0f} ms; "
        f"bfloat16 takes {slow / fast:.1f} times as long (jax {jax.__version__})"
    )


if __name__ == "__main__":
    main()
