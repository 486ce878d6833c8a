"""Time from the start of a process until it is of use: its imports, and its first train steps.

python benchmarks/startup.py --imports=5
python benchmarks/startup.py --config=configs/coco.py --batch_size=1

With ``--imports`` the commands below start in turns, so many times each, and the medians are
printed. Else this file starts itself twice with an empty compilation cache: the first process
compiles, the second one reads what the first has left. Codes and text ids are random; a step is
that of training.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("imports", "state made", "first step", "second step")
IMPORTS = {
    "import jax, flax.nnx": ("-c", "import jax, flax.nnx"),
    "from vqd_jax import VQDiffusion": ("-c", "from vqd_jax import VQDiffusion; VQDiffusion"),
    "vqd_jax.main --help": ("-m", "vqd_jax.main", "--help"),
}


def imports(rounds: int) -> None:
    """Prints the median seconds of every command of ``IMPORTS``, and what is added to the first."""
    seconds = {name: [] for name in IMPORTS}
    for _ in range(1 + rounds):
        for name, arguments in IMPORTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - start)
    first = None
    for name, taken in seconds.items():
        # The first round reads files that the others find in memory.
        median = statistics.median(taken[1:])
        first = median if first is None else first
        print(f"{name}: {median:.2f} s ({median - first:+.2f} s)", flush=True)


def child(path: str, batch_size: int) -> None:
    """Prints the seconds of every part."""
    times = [time.perf_counter()]

    def mark():
        times.append(time.perf_counter())

    sys.path.insert(0, str(ROOT))

    import importlib.util

    import jax
    import numpy as np

    from vqd_jax.parallel import sharding
    from vqd_jax.training import stage_two
    from vqd_jax.training import task as task_lib

    spec = importlib.util.spec_from_file_location("measured", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.training.batch_size = batch_size
    if config.denoiser.condition == "text":
        config.text_encoder.path = "pretrained"
    mark()
    mesh = sharding.make_mesh(config)
    task = stage_two.DenoiserTask(config)
    state = task_lib.init_state(task, mesh)
    jax.block_until_ready(state)
    mark()
    step = task_lib.jit_step(task, mesh)
    shapes = stage_two.abstract_batch(config, mesh)
    batch = {key: np.ones(x.shape, np.int32) for key, x in shapes.items()}
    for _ in range(2):
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        jax.block_until_ready((state, metrics))
        mark()
    print(json.dumps([b - a for a, b in zip(times, times[1:], strict=False)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "coco.py"))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--imports", type=int, help="rounds of the imports, instead of a step")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.imports:
        imports(flags.imports)
        return
    if flags.child:
        child(flags.config, flags.batch_size)
        return
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, __file__, "--child", f"--config={flags.config}"]
        command.append(f"--batch_size={flags.batch_size}")
        for name in ("cold", "warm"):
            start = time.perf_counter()
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            total = time.perf_counter() - start
            if done.returncode:
                sys.exit(done.stderr)
            parts = json.loads(done.stdout.splitlines()[-1])
            listed = ", ".join(f"{p} {s:.1f} s" for p, s in zip(PARTS, parts, strict=True))
            to_first = total - parts[-1]
            print(f"{name}: first step done after {to_first:.1f} s ({listed})", flush=True)


if __name__ == "__main__":
    main()
