"""Seconds a picture at equal quality: diffusers' pipeline and ours, with the same weights.

python benchmarks/equal_quality.py

The packaged model is written for diffusers, which has no strided posterior: it runs through all 100
times, and with fewer steps it takes the last of them. Ours skips times exactly. Both draw a
picture for each of some captions of training objects and people, without guidance and with the
model's truncation. A picture is right if the true one is the nearest of all training pictures
(``emoji_retrieval``). The ratio is of diffusers' largest number of steps, and of our smallest whose
share of right pictures is not lower by more than two standard errors of the difference.

``--student`` adds a model that was distilled from the packaged one, with its own rule:

python -m vqd_jax.main --mode=distil --model=emoji --config=configs/distil.py --workdir=DIR
python benchmarks/equal_quality.py --student=DIR

Seconds are of batches of one picture and of eight, without the first of each. Every side is a
process of its own, with the cores that this one may use, and the sides take turns. Needs the extra
"convert".
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import emoji_retrieval
import generate
import numpy as np

from vqd_jax.data import encode
from vqd_jax.evaluation import distances, measures
from vqd_jax.pipeline import VQDiffusion

BATCHES = (1, 8)


def captions(count: int):
    """Prompts, their true pictures, and all that ``right`` needs of them."""
    model = VQDiffusion.from_pretrained("emoji")
    builder = encode.data_set(model.config)
    records = emoji_retrieval.read(builder, model.config.data.image_size, emoji_retrieval.SPLITS)
    num_train = builder.info.splits["train"].num_examples
    held_out = set(model.config.data.hold_out)
    found = emoji_retrieval.groups(records, num_train, held_out, count)
    places = np.concatenate([found[name].places for name in ("objects", "people")])
    asked = emoji_retrieval.Asked(places, np.repeat(found["objects"].pools[:1], len(places), 0))
    return [records.captions[place] for place in places], records.pixels, asked


def drawer(side: str, folder: Path, student: str):
    """(prompts, steps, seed) -> uint8 [P, S, S, 3], all in one batch."""
    # Both sides compute in float32.
    model = VQDiffusion.from_pretrained("emoji", dtype="float32")
    if side in ("ours", "student"):
        drawn_by = model
        if side == "student":
            drawn_by = VQDiffusion.from_pretrained(student, dtype="float32")

        def ours(prompts, steps, seed):
            made = drawn_by.generate(prompts, num_steps=steps, seed=seed, guidance_scale=1.0)
            return made.pixels[:, 0]

        return ours
    import torch

    pipeline = generate.diffusers_pipeline(str(folder))
    pipeline._encode_prompt = functools.partial(_features, pipeline)
    truncation = model.config.sampling.truncation

    def theirs(prompts, steps, seed):
        made = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=1.0, truncation_rate=truncation,
            generator=torch.Generator().manual_seed(seed), output_type="np",
        )  # fmt: skip
        return np.rint(255 * made.images).astype(np.uint8)

    return theirs


def _features(pipeline, prompt, *_):
    """Features of prompts, torch [P, L, D], as they are; the pipeline would scale them."""
    tokens = pipeline.tokenizer(
        prompt, padding="max_length", max_length=pipeline.tokenizer.model_max_length,
        truncation=True, return_tensors="pt",
    )  # fmt: skip
    return pipeline.text_encoder(tokens.input_ids)[0]


def exported(folder: Path) -> None:
    """Writes the packaged model for diffusers."""
    model = VQDiffusion.from_pretrained("emoji")
    # The layout cannot say that features are not scaled, so such a model is refused. Here
    # ``_features`` takes the scaling away from the pipeline.
    model.config.text_encoder.normalize = True
    model.save_pretrained(str(folder), format="diffusers")


def draw(
    side: str, folder: Path, steps: int, prompts: list[str], target: Path, student: str
) -> None:
    """Draws the pictures of a side into ``target``, and times it; a process of its own."""
    run = drawer(side, folder, student)
    pixels = [run(prompts[i : i + 50], steps, i) for i in range(0, len(prompts), 50)]
    seconds = {}
    for batch in BATCHES:
        times = []
        for repeat in range(6):
            start = time.perf_counter()
            run(prompts[:batch], steps, repeat)
            times.append((time.perf_counter() - start) / batch)
        seconds[f"{batch}"] = float(np.median(times[1:]))
    np.savez(target, pixels=np.concatenate(pixels), **seconds)


def in_process(side: str, folder: Path, steps: int, count: int, student: str) -> dict:
    """What ``draw`` makes, of a fresh process."""
    target = folder.parent / "drawn.npz"
    command = [sys.executable, __file__, "--part", side, str(folder), str(steps), str(target)]
    subprocess.run([*command, f"--count={count}", f"--student={student}"], check=True)
    return dict(np.load(target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="captions of each group")
    parser.add_argument("--ours", type=int, nargs="+", default=[1, 2, 4, 10, 25, 100])
    parser.add_argument("--diffusers", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--student", default="", help="workdir of a model distilled from ours")
    parser.add_argument("--student_steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3, help="of the timings")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    prompts, real, asked = captions(flags.count)
    if flags.part:
        side, folder, steps, target = flags.part
        return draw(side, Path(folder), int(steps), prompts, Path(target), flags.student)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "diffusers")
        exported(folder)
        rows = [("diffusers", n) for n in flags.diffusers] + [("ours", n) for n in flags.ours]
        rows += [("student", n) for n in flags.student_steps if flags.student]
        found = {row: [] for row in rows}
        for number in range(flags.rounds):
            for side, steps in rows:
                # The first round draws all pictures, the others those that are timed.
                count = flags.count if number == 0 else BATCHES[-1] // 2
                found[side, steps].append(in_process(side, folder, steps, count, flags.student))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores; {len(prompts)} captions; medians of {flags.rounds} rounds")
    print("| side, steps | right | PSNR, dB | seconds a picture, one | of eight |")
    print("|---|---|---|---|---|")
    right, seconds = {}, {}
    for row, runs in found.items():
        pixels = runs[0]["pixels"]
        small = emoji_retrieval.small
        right[row] = emoji_retrieval.right(small(pixels), small(real), asked)
        seconds[row] = [np.median([run[f"{batch}"] for run in runs]) for batch in BATCHES]
        psnr = distances.mean_estimate(measures.psnr(pixels, real[asked.places]))
        cells = " | ".join(f"{second:.3f}" for second in seconds[row])
        print(
            f"| {row[0]}, {row[1]} | {emoji_retrieval.share(right[row])} | "
            f"{psnr.value:.1f} ± {psnr.error:.1f} | {cells} |"
        )
    best = ("diffusers", max(flags.diffusers))
    for side, of_side in itertools.groupby(rows[len(flags.diffusers) :], key=lambda row: row[0]):
        equal = [row for row in sorted(of_side) if no_worse(right[row], right[best])]
        if not equal:
            print(f"{side}: no number of steps is as good as diffusers")
            continue
        ratios = np.divide(seconds[best], seconds[equal[0]])
        said = (f"{r:.1f} times at batch {b}" for r, b in zip(ratios, BATCHES, strict=True))
        print(f"{side}: equal at {equal[0][1]} steps: {', '.join(said)}")


def no_worse(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether a share of right pictures is not below another by two standard errors."""
    difference = ours.astype(float) - theirs
    return bool(difference.mean() >= -2 * difference.std(ddof=1) / np.sqrt(len(difference)))


if __name__ == "__main__":
    main()
