"""Generation beside diffusers: seconds a step and peak memory on the same converted weights.

python benchmarks/generate.py

It makes VQ-Diffusion-B (19 layers, 1024 wide, 2887 codes, CLIP ViT-B/32, f8 autoencoder) with
random weights, writes it for diffusers and converts that folder to ours. Every measurement is a
process of its own, since peak memory is a process's; the sides take turns. A step's time is the
difference of two numbers of steps, so that text encoding, decoding and compilation drop out.
diffusers computes in float32 and in bfloat16. Ours computes in float32, once with products of
float32 numbers and once as ``denoiser.product_dtype=auto`` has them on this processor.

Needs diffusers and transformers (extra "convert"), 8 GB of memory and 4 GB of disk.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
SIDES = ("diffusers", "diffusers-bfloat16", "ours-float32", "ours")
GUIDANCE = 5.0
PROMPTS = (
    "A group of elephants walking in muddy water.",
    "A plate of food with broccoli and rice.",
    "A red bus parked on the side of the road.",
    "teddy bear playing in the pool",
)


def build(folder):
    """Random weights, in diffusers' layout and converted to ours."""
    sys.path.insert(0, str(ROOT))
    import jax

    from configs import coco
    from vqd_jax import config as config_lib
    from vqd_jax.interop import convert
    from vqd_jax.models import autoencoder, conditioned
    from vqd_jax.pipeline import VQDiffusion

    config = coco.get_config()
    config.denoiser.dtype, config.denoiser.remat = "float32", "none"
    # Diffusers has no Gumbel quantiser and no remap; decoding is the same.
    config.autoencoder.quantizer, config.autoencoder.codebook_size = "nearest", 0
    key = jax.random.key(0)
    params = conditioned.init_params(config_lib.model_config(config), key)
    codec = autoencoder.init_params(config_lib.autoencoder_config(config), key)
    VQDiffusion(config, params, codec).save_pretrained(f"{folder}/diffusers", format="diffusers")
    convert.convert(f"{folder}/diffusers", f"{folder}/ours")


def load_ours(folder, dtype):
    """(prompts, steps) -> pictures."""
    from vqd_jax.pipeline import VQDiffusion

    model = VQDiffusion.from_pretrained(folder, dtype=dtype or None)

    def generate(prompts, steps):
        made = model.generate(prompts, num_steps=steps, guidance_scale=GUIDANCE, truncation=1.0)
        return made.images

    return generate


def diffusers_pipeline(folder):
    """diffusers' pipeline of a folder, on the cores that this process may use."""
    import diffusers
    import torch
    from diffusers.pipelines.deprecated.vq_diffusion import pipeline_vq_diffusion

    # The index of a pipeline can name only what the library's front page has.
    name = "LearnedClassifierFreeSamplingEmbeddings"
    setattr(diffusers, name, getattr(pipeline_vq_diffusion, name))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = diffusers.VQDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_diffusers(folder, dtype):
    """The same with diffusers' pipeline."""
    import torch

    pipeline = diffusers_pipeline(folder)
    if dtype:
        # The decoder stays in float32: numpy, which takes its pictures, has no bfloat16.
        null = pipeline.learned_classifier_free_sampling_embeddings
        for part in (pipeline.transformer, pipeline.text_encoder, null):
            part.to(getattr(torch, dtype))

    def generate(prompts, steps):
        return pipeline(prompts, num_inference_steps=steps, guidance_scale=GUIDANCE).images

    return generate


def measure(side, folder, batch, steps):
    """{"seconds": of a step, "bytes": peak of generating once} in this process."""
    name, _, dtype = side.partition("-")
    load = {"ours": load_ours, "diffusers": load_diffusers}[name]
    generate = load(f"{folder}/{name}", dtype)
    prompts = list(PROMPTS[:batch])

    def seconds(steps):
        start = time.perf_counter()
        assert len(generate(prompts, steps)) == batch
        return time.perf_counter() - start

    seconds(steps)
    # Not getrusage, whose peak a process takes over from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    # Every number of steps is a program of ours, compiled at its first call.
    seconds(1)
    once, whole = seconds(1), seconds(steps)
    return {"seconds": (whole - once) / (steps - 1), "bytes": peak}


def in_process(*arguments):
    """What ``measure`` gives, of a fresh process."""
    command = [sys.executable, __file__, *map(str, arguments)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1]) if run.stdout else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="up to 4")
    parser.add_argument("--steps", type=int, default=3, help="network calls of the longer run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="of the models, kept; a temporary one if unset")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part == "build":
        return build(flags.folder)
    if flags.part:
        return print(json.dumps(measure(flags.part, flags.folder, flags.batch, flags.steps)))

    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.folder or scratch
        if not pathlib.Path(folder, "ours").exists():
            in_process("--part=build", f"--folder={folder}")
        print(f"{os.cpu_count()} cores; guidance {GUIDANCE}; medians of {flags.rounds} rounds")
        print(f"{'batch':>5}  {'side':20}{'seconds a step':>15}{'peak MiB':>10}{'times ours':>12}")
        for batch in flags.batches:
            seen = {side: [] for side in SIDES}
            for _ in range(flags.rounds):
                for side in SIDES:
                    options = (f"--folder={folder}", f"--batch={batch}", f"--steps={flags.steps}")
                    seen[side].append(in_process(f"--part={side}", *options))
            middle = {
                side: [
                    statistics.median(run[name] for run in runs) for name in ("seconds", "bytes")
                ]
                for side, runs in seen.items()
            }
            for side, (seconds, peak) in middle.items():
                ratio = seconds / middle["ours"][0]
                cells = f"{seconds:15.2f}{peak / 2**20:10.0f}{ratio:12.2f}"
                print(f"{batch:5}  {side:20}{cells}", flush=True)


if __name__ == "__main__":
    main()
