"""Two choices for a CPU: attention head by head, and float32 as the compute dtype.

python benchmarks/cpu.py

Prints how long XLA's attention takes beside attention head by head, and how long a training step of
configs/emoji.py takes in bfloat16 beside float32. Times are the smallest of several runs, which
alternate between the two sides.
"""

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


def main() -> None:
    compare_attention()
    slow, fast = fastest([train_step("bfloat16"), train_step("float32")], 5)
    print(
        f"\ntraining step of configs/emoji.py: bfloat16 {slow:.0f} ms, float32 {fast:.0f} ms; "
        f"bfloat16 takes {slow / fast:.1f} times as long (jax {jax.__version__})"
    )


if __name__ == "__main__":
    main()
