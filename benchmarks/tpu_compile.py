"""Compiles train steps and samplers for TPU slices that are not there, and prints what they take.

pip install -e '.[tpu]'
python benchmarks/tpu_compile.py --config=configs/coco.py --topology=v5e:4x4 --fsdp=4
python benchmarks/tpu_compile.py --all --json=tpu_compile.jsonl

The compiler of the real chips does it; no TPU is needed. It prints GiB on a chip (arguments,
temporaries, outputs), what a chip receives from others in one run of the program, and how long the
compilation took. ``--all`` makes the table of docs/scaling.md, in ten minutes on two idle cores; it
leaves out programs that the file has already.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from vqd_jax import config as config_lib
from vqd_jax import generation
from vqd_jax.diffusion import sampler
from vqd_jax.errors import UserError
from vqd_jax.models import conditioned
from vqd_jax.parallel import program, sharding
from vqd_jax.training import stage_two
from vqd_jax.training import task as task_lib

GIB, MIB = 2**30, 2**20
# Published bfloat16 FLOP/s, and bytes/s that a chip receives over the two links of one axis of the
# torus: half of the published bandwidth of its links, v5p with a third of six.
CHIPS = {"v5e": (197e12, 100e9), "v5p": (459e12, 200e9), "v6e": (918e12, 200e9)}

COCO, CUB_S, IMAGENET, FFHQ, ITHQ = (
    f"configs/{name}.py" for name in ("coco", "cub_small", "imagenet", "ffhq", "ithq")
)
# (program, config, rows of the batch a chip, topology, fsdp). Samplers keep the model whole on
# every chip: they need no gradients and no moments, and would gather it anew in every step.
TABLE = (
    ("train", COCO, 8, "v5e:4x4", 16),
    ("train", COCO, 8, "v5e:8x8", 16),
    ("train", COCO, 8, "v5e:16x16", 16),
    ("train", COCO, 8, "v5e:1", 1),
    ("train", ITHQ, 4, "v5e:4x4", 16),
    ("sample", COCO, 8, "v5e:4x4", 1),
    ("sample", ITHQ, 8, "v5e:4x4", 1),
    ("train", IMAGENET, 16, "v5e:4x4", 16),
    ("train", FFHQ, 16, "v5e:4x4", 16),
    ("train", CUB_S, 8, "v5e:4x4", 1),
    ("sample", IMAGENET, 8, "v5e:4x4", 1),
    ("sample", FFHQ, 8, "v5e:4x4", 1),
    ("sample", CUB_S, 8, "v5e:4x4", 1),
    ("train", COCO, 8, "v5p:2x2x4", 16),
    ("train", COCO, 8, "v6e:4x4", 16),
    ("train", ITHQ, 4, "v5e:16x16", 16),
    ("train", ITHQ, 8, "v5p:2x2x4", 16),
    ("train", CUB_S, 8, "v5e:1", 1),
    ("train", IMAGENET, 16, "v5e:1", 1),
    ("train", FFHQ, 16, "v5e:1", 1),
    ("sample", COCO, 8, "v5e:1", 1),
)


def load_config(path: str, rows: int, num_chips: int, fsdp: int):
    """The config of a file, with a batch of ``rows`` a chip and pretrained text features."""
    # Configs of published sizes import what they share from their folder.
    sys.path.insert(0, str(Path(path).resolve().parents[1]))
    spec = importlib.util.spec_from_file_location("benchmarked", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if config.denoiser.condition == "text":
        # Named, not read: a pretrained text encoder has neither gradients nor moments.
        config.text_encoder.path = "pretrained"
    config.training.batch_size = rows * num_chips
    config.mesh.fsdp = fsdp
    config.denoiser.remat = "full"
    return config


def forward_flops(config) -> int:
    """FLOPs of one image through the denoiser, two a multiply and add; matrix products only."""
    c, sizes = config.denoiser, config_lib.model_config(config).denoiser
    n, d, length = sizes.grid[0] * sizes.grid[1], c.width, config.text_encoder.context_length
    layer = 4 * n * d * d + 2 * n * n * d
    layer += (9 if c.mlp == "conv" else 1) * 2 * n * d * d * c.mlp_ratio
    if c.condition == "text":
        layer += 2 * n * d * d + 2 * length * sizes.text_width * d + 2 * n * length * d
    return 2 * (c.num_layers * layer + n * d * sizes.num_codes)


def predicted(result: dict) -> tuple[float, float]:
    """Seconds of one step on paper: matrix products at the published peak, exchanges by the links.

    A training step is a pass forward, one again for what was not kept, and two backward; a step of
    the sampler is two passes with guidance and one without.
    """
    peak, link = CHIPS[result["topology"].split(":")[0]]
    config = load_config(result["config"], result["rows"], result["chips"], result["fsdp"])
    moved = sum(size for _, size in result["exchanged"].values())
    passes, steps = 4, 1
    if result["program"] == "sample":
        passes, steps = (
            (1 if config.denoiser.condition == "none" else 2),
            config.diffusion.num_steps,
        )
    return passes * forward_flops(config) * result["rows"] / peak, moved / steps / link


def show(path: str) -> None:
    """Prints the programs of a file as a Markdown table."""
    print(
        "| program | config | slice | fsdp | rows a chip | arguments + temporaries, GiB | received "
        "a chip and step, MiB | products, ms | links, ms | compiled in, s |"
    )
    print("|" + "---|" * 10)
    with open(path, encoding="utf-8") as file:
        results = [json.loads(line) for line in file]
    for r in results:
        start = "| {program} | {name} | {topology} | {fsdp} | {rows} | ".format(
            name=Path(r["config"]).stem, **r
        )
        if "does_not_fit" in r:
            print(f"{start}does not fit | | | | |")
            continue
        products, links = predicted(r)
        steps = 100 if r["program"] == "sample" else 1
        moved = ", ".join(
            f"{kind} {size / steps / MIB:.0f}" for kind, (_, size) in r["exchanged"].items()
        )
        print(
            f"{start}{r['arguments'] / GIB:.2f} + {r['temporaries'] / GIB:.2f} | "
            f"{moved or 'nothing'} | {products * 1e3:.1f} | {links * 1e3:.1f} | "
            f"{r['compile_seconds']:.0f} |"
        )


def lower_sampler(config, mesh, rows: int) -> jax.stages.Lowered:
    """The sampler with guidance and truncation, T network calls; ``rows`` images of all chips."""
    model_config = config_lib.model_config(config)
    schedule = config_lib.noise_schedule(config)
    params = conditioned.abstract_params(model_config)
    params = sharding.with_shardings(params, sharding.shardings(params, mesh))
    placed, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    condition = (rows, config.text_encoder.context_length)
    if config.denoiser.condition != "text":
        condition = (rows,)
    struct = jax.ShapeDtypeStruct
    guidance = None if config.denoiser.condition == "none" else struct((), jnp.float32)
    settings = sampler.Settings(guidance=guidance, truncation=struct((), jnp.float32))

    def sample(params, keys, condition, null, settings):
        return generation.draw(
            params,
            keys,
            condition,
            null,
            settings,
            model_config=model_config,
            schedule=schedule,
            placement=sharding.placement(mesh),
        ).codes

    return jax.jit(sample, out_shardings=placed).lower(
        params,
        struct(keys.shape, keys.dtype, sharding=placed),
        struct(condition, jnp.int32, sharding=placed),
        struct((1, *condition[1:]), jnp.int32, sharding=whole),
        settings,
    )


def measure(kind: str, config, mesh, rows: int, hlo_path: str | None = None) -> dict:
    """Compiles one program and reads off what it takes of a chip."""
    start = time.perf_counter()
    task = stage_two.DenoiserTask(config)
    state = task_lib.abstract_state(task, mesh)
    if kind == "train":
        lowered = task_lib.jit_step(task, mesh).lower(state, stage_two.abstract_batch(config, mesh))
    else:
        lowered = lower_sampler(config, mesh, rows * mesh.size)
    lowered_at = time.perf_counter()
    try:
        compiled = program.compiled(lowered, mesh.devices.flat[0])
    except UserError as error:
        return {"does_not_fit": str(error).splitlines()[0]}
    seconds = time.perf_counter() - lowered_at
    hlo = compiled.as_text()
    if hlo_path:
        with open(hlo_path, "w", encoding="utf-8") as file:
            file.write(hlo)
    found = program.collectives(hlo)
    grid = config_lib.model_config(config).denoiser.grid
    stream = grid[0] * grid[1] * config.denoiser.width
    gathered = gathered_activations(found, [x.shape for x in jax.tree.leaves(state.params)], stream)
    return {
        **program.memory(compiled)._asdict(),
        "exchanged": program.by_kind(found),
        "gathered_activations": [c._asdict() for c in gathered],
        "flops": (compiled.cost_analysis() or {}).get("flops"),
        "trace_seconds": lowered_at - start,
        "compile_seconds": seconds,
    }


def gathered_activations(
    found: Iterable[program.Collective], parameter_shapes: Iterable[tuple[int, ...]], stream: int
) -> list[program.Collective]:
    """All-gathers of activations: of arrays of the size of a stream, but not of a parameter.

    Args:
      found: of ``program.collectives``.
      parameter_shapes: of all parameters; a stack of layers, or one of them, may be gathered.
      stream: elements [N, D] of the stream of one image. An array gathered from G devices is one
        of activations if it holds at least G streams. Vectors, such as those of times, are smaller.
    """
    sizes = {math.prod(part) for shape in parameter_shapes for part in (shape, shape[1:])}
    return [
        c
        for c in found
        if c.kind == "all-gather"
        and any(math.prod(s) >= c.group * stream and math.prod(s) not in sizes for s in c.shapes)
    ]


def row(result: dict) -> str:
    """One line of the table."""
    name = "{program:6} {config:22} {topology:10} fsdp {fsdp:<3} {rows:2} rows a chip: ".format(
        **result
    )
    if "does_not_fit" in result:
        return name + result["does_not_fit"]
    exchanged = ", ".join(
        f"{kind} {number} x {moved / MIB:.0f} MiB"
        for kind, (number, moved) in result["exchanged"].items()
    )
    return name + (
        "{:.2f} + {:.2f} + {:.2f} GiB; ".format(
            *(result[key] / GIB for key in ("arguments", "temporaries", "outputs"))
        )
        + f"{exchanged or 'nothing exchanged'}; activations gathered: "
        f"{len(result['gathered_activations'])}; {result['compile_seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/coco.py")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--fsdp", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8, help="of the batch, a chip")
    parser.add_argument("--program", choices=("train", "sample"), default="train")
    parser.add_argument("--all", action="store_true", help="the table of docs/scaling.md")
    parser.add_argument("--json", help="file to which a line a program is appended")
    parser.add_argument("--show", help="print the table of such a file, and compile nothing")
    parser.add_argument("--hlo", help="file for the text of the compiled program")
    flags = parser.parse_args()
    if flags.show:
        show(flags.show)
        return
    jobs = [(flags.program, flags.config, flags.rows, flags.topology, flags.fsdp)]
    if flags.all:
        jobs = TABLE
    done = set()
    if flags.json and os.path.exists(flags.json):
        with open(flags.json, encoding="utf-8") as file:
            done = {tuple(json.loads(line)["job"]) for line in file}
    for job in jobs:
        if job in done:
            continue
        kind, path, rows, topology, fsdp = job
        devices = program.topology(topology)
        config = load_config(path, rows, len(devices), fsdp)
        result = {
            "job": job, "program": kind, "config": path, "topology": topology, "fsdp": fsdp,
            "rows": rows, "chips": len(devices),
        }  # fmt: skip
        mesh = sharding.make_mesh(config, devices)
        result |= measure(kind, config, mesh, rows, flags.hlo)
        print(row(result), flush=True)
        for found in result.get("gathered_activations", ()):
            print("  gathered:", found, file=sys.stderr)
        if flags.json:
            with open(flags.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
