"""An autoregressive model and ours on one chip that is not there: time on paper, and kernels.

pip install -e '.[gpu]'
python benchmarks/autoregressive_chips.py --chip=h100:1 --tokens 64 256 1024 --batch 1 16

The samplers of ``autoregressive.py``, ours in 25 calls, are compiled in bfloat16 for the chip. For
a TPU, ``.[tpu]`` has the compiler. A program takes as long as the chip's memory needs for what its
kernels read and write, or as the products of the formulas do at the peak, whichever is longer. A
launch takes nothing, so each time is a lower bound; the kernels of a batch stand beside it.
"""

import argparse
import importlib
import math

# First: it keeps JAX on the CPU, before anything else reads the platform.
import gpu_compile  # isort: skip
import autoregressive
import jax
import jax.numpy as jnp
import study
import tpu_compile

from vqd_jax import config as config_lib
from vqd_jax.parallel import program, sharding

# Published bfloat16 FLOP/s, and bytes/s of memory.
CHIPS = {
    "h100": (gpu_compile.PEAK, gpu_compile.BANDWIDTH),
    "v5e": (tpu_compile.CHIPS["v5e"][0], 819e9),
}
CALLS = 25


def pass_flops(config, side: int) -> float:
    """FLOPs of one image of ``side`` rows through our denoiser."""
    resized = config.copy_and_resolve_references()
    rows = config_lib.model_config(config).denoiser.grid[0]
    resized.data.image_size = config.data.image_size * side // rows
    resized.denoiser.position_table = ()
    return tpu_compile.forward_flops(resized)


def on_paper(config, side: int, batch: int, chip: str) -> dict[str, tuple[float, int]]:
    """Seconds a picture, and kernels a batch, of both programs."""
    peak, bandwidth = CHIPS[chip.split(":")[0]]
    mesh = sharding.make_mesh(config, program.topology(chip))
    placed = sharding.replicated(mesh)

    def abstract(x):
        if not hasattr(x, "shape"):
            return x
        # Parameters and the two numbers of the request; the latter do not matter.
        dtype = jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=placed)

    found, made = {}, autoregressive.programs(config, side, batch, (CALLS,))
    for name, (sampled, (make, *arguments)) in made.items():
        shapes = jax.tree.map(abstract, (jax.eval_shape(make), *arguments))
        compiled = program.compiled(sampled.lower(*shapes), mesh.devices.flat[0])
        launched = gpu_compile.kernels(compiled.as_text(), peak, bandwidth)
        moved = sum(kernel.moved for kernel in launched)
        # With guidance there are two passes; the autoregressive model takes each token once.
        passes = 2 * (1 if name == "autoregressive" else CALLS)
        products = passes * batch * pass_flops(config, side)
        total = max(moved / bandwidth, products / peak)
        found[name] = total / batch, sum(kernel.turns for kernel in launched)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="h100:1", help="h100:1 or v5e:1")
    parser.add_argument("--size", default="coco", help="a file of configs/")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 1024], help="squares")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    flags = parser.parse_args()
    config, lines = importlib.import_module(f"configs.{flags.size}").get_config(), []
    config.denoiser.dtype = "bfloat16"
    config.denoiser.scan_unroll = config.denoiser.num_layers
    for side in (math.isqrt(n) for n in flags.tokens):
        for batch in flags.batch:
            found = on_paper(config, side, batch, flags.chip)
            cells = [f"{1e3 * x:.2f} ms, {count} kernels" for x, count in found.values()]
            lines.append([side**2, batch, *cells])
            print(lines[-1], flush=True)
    title = f"A picture at the size of configs/{flags.size}.py, with guidance, on paper"
    study.print_table(f"{title} ({flags.chip})", ["N", "batch", *found], lines)


if __name__ == "__main__":
    main()
