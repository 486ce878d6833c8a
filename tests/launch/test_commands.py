"""Every command that a page, a config or a launcher shows: its flags, its config, its mesh."""

import copy
import math
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from vqd_jax import config as config_lib
from vqd_jax import main
from vqd_jax.errors import UserError
from vqd_jax.parallel import sharding

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("*.md", "docs/*.md", "configs/*.py", "launch/**/*", "vqd_jax/main.py")
PAGES = sorted(path for place in PLACES for path in ROOT.glob(place) if path.is_file())
STARTS = re.compile(
    r"(?:\b[A-Z]+=\S+ +|\.\.\. +)*"
    r"(?:python -m vqd_jax\.main|launch/local\.sh|launch/tpu_vm\.sh|sbatch .*launch/slurm\.sbatch"
    r"|docker run .*vqd_jax:\w+)\s"
    r"[^`|]*"
)


def commands(path):
    """(command, the line around it) of every command of a file."""
    text = path.read_text(encoding="utf-8")
    # A line that ends in a backslash goes on, in a comment too.
    text = re.sub(r" *\\\n[# ]*", " ", text)
    for line in text.splitlines():
        for match in STARTS.finditer(line):
            command = re.split(r" && |  +#", match.group())[0].strip()
            # One inside quotation marks ends with the second of them.
            command = command.removesuffix('"' * (command.count('"') % 2))
            # The launchers' own lines, whose flags are variables.
            if "--" in command and '"$@"' not in command:
                yield command, line


SHOWN = [(path.relative_to(ROOT), *found) for path in PAGES for found in commands(path)]


def parsed(arguments):
    """Values of the flags by name, and the config, by the flags of the command line."""
    values = flags.FlagValues()
    for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]:
        if flag.name != "config":
            values[flag.name] = copy.deepcopy(flag)
            values[flag.name].unparse()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    argv = ["main", *arguments]
    # The flag of a config looks for its fields there.
    with mock.patch.object(sys, "argv", argv):
        assert values(argv) == ["main"]
    return values


def devices(text, values):
    """How many devices a command names; 1 where it names none."""
    if values.topology:
        kind, _, shape = values.topology.partition(":")
        return math.prod(map(int, shape.split("x")))
    if tpu := re.search(r"TPU=v5litepod-(\d+)|--tpu-type=v5litepod-(\d+)", text):
        return int(tpu.group(1) or tpu.group(2))
    if nodes := re.search(r"sbatch --nodes=(\d+)", text):
        batch = (ROOT / "launch" / "slurm.sbatch").read_text()
        return int(nodes.group(1)) * int(re.search(r"--gpus-per-node=(\d+)", batch).group(1))
    found = dict(re.findall(r"(PROCESSES|DEVICES)=(\d+)", text))
    return math.prod(map(int, found.values()))


def check(num_devices, values, *, whole=True):
    """The command may start: possible values, all paths, and a batch that divides."""
    config, mode = values.config, values.mode or "train"
    config_lib.validate(config)
    c, codec = config.training, config.autoencoder
    mesh = jax.sharding.AbstractMesh(sharding.mesh_shape(config, num_devices), sharding.AXES)
    sharding.require_divisible("training.batch_size", c.batch_size, mesh, c.gradient_accumulation)
    if not whole or mode == "plan":
        return
    assert values.workdir or values.output or mode == "prepare"
    config_lib.require_data(config)
    # An autoencoder with a remap cannot be trained here, and text features of length 1 are CLIP's.
    if mode in ("train", "train_autoencoder", "encode"):
        assert codec.path or not codec.codebook_size
    if mode in ("train", "encode"):
        assert config.text_encoder.path or not config.text_encoder.normalize


def test_commands_are_found():
    found = {str(path) for path, _, _ in SHOWN}
    assert {"README.md", "docs/scaling.md", "docs/weights.md", "launch/tpu_vm.sh"} <= found
    assert {"launch/gke_jobset.yaml", "launch/slurm.sbatch", "launch/local.sh"} <= found
    configs = {f"configs/{path.name}" for path in ROOT.glob("configs/*.py")}
    assert configs - found == {"configs/__init__.py", "configs/published.py"}
    assert len(SHOWN) > 30


@pytest.mark.parametrize(
    ("command", "line"), [shown[1:] for shown in SHOWN], ids=[str(shown[0]) for shown in SHOWN]
)
def test_a_command_has_flags_and_a_config_that_validates(command, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    first = next(i for i, word in enumerate(words) if re.search(r"main$|launch/|vqd_jax:", word))
    # "..." stands for further words, and for a value that the reader chooses.
    arguments = [word for word in words[first + 1 :] if word != "..."]
    whole = "..." not in command
    arguments = [word for word in arguments if word != "--config=..."]
    values = parsed([a for a in arguments if whole or values_known(a, arguments)])
    if values.config is not None:
        check(devices(line, values), values, whole=whole)


def values_known(argument, arguments):
    """Whether a flag can be parsed: fields of a config need the config."""
    has_config = any(a.startswith("--config=") for a in arguments)
    return has_config or not argument.startswith("--config.")


def test_the_jobset_starts():
    (jobset,) = yaml.safe_load_all((ROOT / "launch" / "gke_jobset.yaml").read_text())
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    chips = spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    check(chips, parsed(container["args"]))


def test_a_command_that_cannot_start_is_found():
    coco = ["--config=configs/coco.py", "--workdir=x"]
    with pytest.raises(UserError, match="batch_size=32 cannot be divided"):
        check(256, parsed(coco))
    with pytest.raises(UserError, match="config.data.dir is empty: coco_text is made from"):
        check(1, parsed(coco))
    with pytest.raises(AssertionError):
        check(1, parsed([*coco, "--config.data.dir=x"]))
    with pytest.raises(flags.Error):
        parsed([*coco, "--no_such_flag"])
