"""Does the suite find a fault? Thirty-odd of them, put in one at a time, at least one in each room.

python benchmarks/seeded_faults.py [--only=WORD] [--root=CHECKOUT] [--whole-suite] [--check]

Copies the checkout, changes one line of the copy, runs the tests that should notice, and prints
whether one failed. ``--whole-suite`` runs all tests for each fault, which takes hours. A fault that
nothing notices is a gap in the tests, and a changed line that is no longer there is an error.
``--check`` runs no test: it names the faults whose line or tests are no longer there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """One changed line.

    Attributes:
      name: what is wrong.
      file: the file with the line.
      old, new: text that occurs once in the file, and its replacement.
      tests: files, folders or tests that should notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # The noise.
    Fault(
        "cosine noise rises from the other end",
        "vqd_jax/diffusion/schedule.py",
        "np.sin(0.5 * np.pi",
        "np.cos(0.5 * np.pi",
        ("tests/diffusion/test_schedule.py",),
    ),
    Fault(
        "the posterior forgets that a replaced token may have been replaced earlier",
        "vqd_jax/diffusion/transition.py",
        "kept + b.stay_replaced * noise +",
        "kept + noise +",
        ("tests/diffusion/test_transition.py",),
    ),
    Fault(
        "all tokens of an image share a key",
        "vqd_jax/diffusion/rules.py",
        "keys = jax.random.split(key, tokens.shape)",
        "keys = jnp.broadcast_to(key, tokens.shape)",
        ("tests/diffusion/test_rules.py", "tests/diffusion/test_sampler.py"),
    ),
    Fault(
        "an exponential of 32 bits only",
        "vqd_jax/diffusion/draws.py",
        "(high + (low + 0.5) * 2.0**-32) * 2.0**-32",
        "(high + 0.5) * 2.0**-32",
        ("tests/diffusion/test_draws.py",),
    ),
    Fault(
        "the loss is not divided by the probability of its time",
        "vqd_jax/diffusion/objective.py",
        "scale = 1.0 / (p[t - 1] * batch * num_tokens)",
        "scale = schedule.num_steps / (batch * num_tokens)",
        ("tests/diffusion/test_objective.py",),
    ),
    Fault(
        "likelihoods in nats",
        "vqd_jax/diffusion/objective.py",
        "return total / jnp.log(2.0)",
        "return total",
        ("tests/diffusion/test_objective.py", "tests/evaluation"),
    ),
    Fault(
        "guidance starts at the conditional answer",
        "vqd_jax/diffusion/shaping.py",
        "return log_null + scale * (log_cond - log_null)",
        "return log_cond + scale * (log_cond - log_null)",
        ("tests/diffusion/test_sampler.py",),
    ),
    Fault(
        "truncation and top-k keep a tenth less",
        "vqd_jax/diffusion/shaping.py",
        "weight, 0.0).sum(-1, keepdims=True) >= amount",
        "weight, 0.0).sum(-1, keepdims=True) >= 0.9 * amount",
        ("tests/diffusion/test_sampler.py",),
    ),
    Fault(
        "known codes are not put back",
        "vqd_jax/diffusion/sampler.py",
        "jnp.where(settings.known < schedule.num_codes, settings.known, tokens)",
        "jnp.where(settings.known < 0, settings.known, tokens)",
        ("tests/diffusion/test_editing.py",),
    ),
    Fault(
        "confidence reveals the least likely first",
        "vqd_jax/diffusion/rules.py",
        "rank = jnp.argsort(jnp.argsort(-priority))",
        "rank = jnp.argsort(jnp.argsort(priority))",
        ("tests/diffusion/test_rules.py",),
    ),
    # The networks.
    Fault(
        "scores are not masked for the future",
        "vqd_jax/models/attention.py",
        "causal=causal, placement=self.placement",
        "causal=False, placement=self.placement",
        ("tests/models/test_attention.py", "tests/models/test_clip.py"),
    ),
    Fault(
        "a modulation scales by its value and not by one more",
        "vqd_jax/models/denoiser.py",
        "self.norm(h) * (1 + scale) + shift",
        "self.norm(h) * scale + shift",
        ("tests/models/test_denoiser.py", "tests/interop"),
    ),
    Fault(
        "the position of a token is read column by column",
        "vqd_jax/models/denoiser.py",
        "return table.reshape(1, rows * columns, -1)",
        "return table.swapaxes(0, 1).reshape(1, rows * columns, -1)",
        ("tests/models/test_denoiser.py", "tests/interop"),
    ),
    Fault(
        "the codebook's moving average follows the batch too fast",
        "vqd_jax/models/quantizer.py",
        "total = decay * state.cluster_sum + (1.0 - decay) * batch_sum",
        "total = decay * state.cluster_sum + batch_sum",
        ("tests/models/test_quantizer.py",),
    ),
    Fault(
        "pixels are truncated and not rounded",
        "vqd_jax/models/autoencoder.py",
        "jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5)",
        "jnp.floor((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5)",
        ("tests/models/test_autoencoder.py",),
    ),
    # Files and devices.
    Fault(
        "a file is written in its place",
        "vqd_jax/files.py",
        "yield scratch",
        "yield target",
        ("tests/test_files.py",),
    ),
    Fault(
        "rows that fill a batch count",
        "vqd_jax/parallel/rows.py",
        "min(size, num_rows - start)",
        "size",
        ("tests/parallel/test_rows.py",),
    ),
    # The data.
    Fault(
        "every process reads the rows of the first",
        "vqd_jax/data/order.py",
        "first = place + self.process_index * size",
        "first = place",
        ("tests/data/test_order.py",),
    ),
    Fault(
        "a resumed run begins its epoch again",
        "vqd_jax/data/order.py",
        'self._records = int(state["records"])',
        "self._records = 0",
        ("tests/data/test_order.py",),
    ),
    Fault(
        "an error of the system is a bad record",
        "vqd_jax/data/bad_records.py",
        "except (OSError, MemoryError):",
        "except MemoryError:",
        ("tests/data/test_bad_records.py", "tests/data/test_batches.py"),
    ),
    Fault(
        "two processes encode the same shards",
        "vqd_jax/data/encode.py",
        "shards = range(index, self.num_shards, count)",
        "shards = range(self.num_shards)",
        ("tests/data/test_encode.py", "tests/data/test_kills.py"),
    ),
    Fault(
        "HTML entities of HTML entities stay in a caption",
        "vqd_jax/data/text.py",
        "html.unescape(html.unescape(text))",
        "html.unescape(text)",
        ("tests/data/test_text.py",),
    ),
    Fault(
        "a caption that is too long loses its end mark",
        "vqd_jax/data/text.py",
        "ids = [*ids[: length - 1], self.end_id]",
        "ids = ids[:length]",
        ("tests/data/test_text.py",),
    ),
    # The surface of a config.
    Fault(
        "a seed of 2**32 passes",
        "vqd_jax/config.py",
        "0 <= config.seed < 2**32",
        "0 <= config.seed <= 2**32",
        ("tests/test_config.py",),
    ),
    Fault(
        "a continued run may change its noise",
        "vqd_jax/config.py",
        '    "denoiser.remat",\n',
        '    "denoiser.remat",\n    "diffusion.",\n',
        ("tests/test_config.py",),
    ),
    # Training.
    Fault(
        "the gradients of a batch's parts are added and not averaged",
        "vqd_jax/training/task.py",
        "t + x / parts",
        "t + x",
        ("tests/training/test_task.py", "tests/training/test_stage_two.py", "tests/training"),
    ),
    Fault(
        "the average of the parameters stays young",
        "vqd_jax/training/optimizer.py",
        "(1.0 + step) / (10.0 + step)",
        "1.0 / 10.0",
        ("tests/training",),
    ),
    Fault(
        "every step draws the same noise",
        "vqd_jax/training/stage_two.py",
        "jax.random.fold_in(state.key, state.step)",
        "jax.random.fold_in(state.key, 0)",
        ("tests/training",),
    ),
    Fault(
        "a loss that is not finite is saved",
        "vqd_jax/training/loop.py",
        """            if log or evaluate or save:
                _require_finite(last, self._saved)
""",
        "",
        ("tests/training/test_loop.py",),
    ),
    Fault(
        "an older checkpoint is taken although the newest is whole",
        "vqd_jax/checkpoint.py",
        "sorted(self._manager.all_steps(), reverse=True)",
        "sorted(self._manager.all_steps())",
        ("tests/training/test_loop.py", "tests/test_checkpoint.py"),
    ),
    Fault(
        "the rows of a layer's parameters are divided along the wrong axis",
        "vqd_jax/parallel/sharding.py",
        '(r"\\.(proj|mlp_out)\\.kernel$", PartitionSpec("tensor", "fsdp"))',
        '(r"\\.(proj|mlp_out)\\.kernel$", PartitionSpec("fsdp", "tensor"))',
        ("tests/parallel/test_sharding.py",),
    ),
    Fault(
        "shuffled captions are the right ones for some pictures",
        "vqd_jax/evaluation/likelihood.py",
        "result[order] = np.roll(order, 1)",
        "result[order] = order[::-1]",
        ("tests/evaluation",),
    ),
    # Other programs' files.
    Fault(
        "a convolution's kernel is read upside down",
        "vqd_jax/interop/tables.py",
        '"conv": lambda x: x.transpose(2, 3, 1, 0)',
        '"conv": lambda x: x.transpose(3, 2, 1, 0)',
        ("tests/interop/test_tables.py", "tests/interop/test_taming.py"),
    ),
    Fault(
        "a tensor may reach beyond its storage",
        "vqd_jax/interop/torch_file.py",
        "if last >= storage.size:",
        "if last > 2 * storage.size:",
        ("tests/interop/test_torch_file.py",),
    ),
    # From a sentence to a picture.
    Fault(
        "all pictures of a prompt share a key",
        "vqd_jax/generation.py",
        "jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1])",
        "jax.random.fold_in(root, pair[0])",
        ("tests/test_pipeline.py",),
    ),
    Fault(
        "the part that is kept is painted",
        "vqd_jax/pipeline.py",
        "np.where(marks, self._networks.num_codes, codes)",
        "np.where(marks, codes, self._networks.num_codes)",
        ("tests/test_pipeline.py",),
    ),
    Fault(
        "two processes draw the same pictures",
        "vqd_jax/bulk.py",
        "waiting[jax.process_index() :: jax.process_count()]",
        "waiting[:: jax.process_count()]",
        ("tests/test_bulk.py",),
    ),
)


def outdated(fault: Fault, root: Path) -> list[str]:
    """What a checkout lacks of a fault: its line, once, and its tests."""
    path = root / fault.file
    count = path.read_text(encoding="utf-8").count(fault.old) if path.exists() else 0
    found = [] if count == 1 else [f"{fault.file} has {count} times: {fault.old}"]
    return found + [f"{test} is not there" for test in fault.tests if not (root / test).exists()]


def copy_of(root: Path, folder: Path) -> Path:
    """The tracked files of a checkout, beside the same ``shared`` folder."""
    target = folder / "main"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    if (root.parent / "shared").exists():
        (folder / "shared").symlink_to((root.parent / "shared").resolve())
    return target


def is_caught(fault: Fault, copy: Path, whole_suite: bool) -> tuple[bool, str]:
    """Whether a test fails, and the line that says which."""
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
            + ([] if whole_suite else list(fault.tests)),
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text, encoding="utf-8")
    said = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if run.returncode not in (0, 1, 2):
        raise SystemExit(run.stdout[-3000:] + run.stderr[-3000:])
    return run.returncode != 0, said[0].split(" - ")[0] if said else run.stdout[-200:].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name or file has this word")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to try them on")
    parser.add_argument("--whole-suite", action="store_true")
    parser.add_argument("--check", action="store_true", help="run no test")
    arguments = parser.parse_args()
    missed = []
    faults = [f for f in FAULTS if arguments.only in f.name or arguments.only in f.file]
    lacks = [f"{f.name}: {what}" for f in faults for what in outdated(f, arguments.root)]
    if lacks:
        raise SystemExit("\n".join(lacks))
    if arguments.check:
        print(f"{len(faults)} faults can be put in")
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(arguments.root.resolve(), Path(folder))
        for fault in faults:
            start = time.monotonic()
            caught, where = is_caught(fault, copy, arguments.whole_suite)
            if not caught:
                missed.append(fault.name)
            verdict = "caught" if caught else "MISSED"
            print(f"{verdict}  {fault.name} [{time.monotonic() - start:.0f} s] {where}", flush=True)
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
