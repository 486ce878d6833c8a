"""Trains, samples and converts VQ-Diffusion.

python -m vqd_jax.main --prompt="red heart" --prompt="woman astronaut, medium skin tone"
python -m vqd_jax.main --config=configs/emoji.py --workdir=DIR
python -m vqd_jax.main --mode=sample --workdir=DIR --prompt="red heart" --num_images=4
python -m vqd_jax.main --mode=serve --workdir=DIR
python -m vqd_jax.main --mode=convert --source=coco_learnable.pth --target=models/coco
python -m vqd_jax.main --mode=sample --model=models/coco --prompt="teddy bear in the pool"
python -m vqd_jax.main --mode=evaluate --model=DIR --config=configs/emoji.py --output=OUT
"""

import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from vqd_jax import console, files
from vqd_jax.errors import UserError

FLAGS = flags.FLAGS


class _Path(flags.ArgumentParser):
    """A path, in which ~ and $VARIABLES are replaced: after an "=", few shells do it."""

    def parse(self, argument):
        return files.expanded(argument)

    def flag_type(self) -> str:
        return "path"


def _define_path(name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE(_Path(), name, None, text)


def _define_paths(name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, None, text)


# Fields of a config that are paths, or tuples of them.
_PATH_FIELDS = (
    "data.dir", "data.prepared_dir", "data.codes", "data.more_codes", "autoencoder.path",
    "autoencoder.init_from", "autoencoder.perceptual_path", "text_encoder.path",
    "training.init_from", "training.checkpoints", "evaluation.features_path",
    "evaluation.inception", "evaluation.inception_statistics", "evaluation.clip",
    "evaluation.cache", "distil.prompts_path",
)  # fmt: skip
# Tasks that a config describes; each is a function of modes.py.
ON_CONFIG = ("train", "train_autoencoder", "prepare", "encode", "inspect", "plan")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; fields as --config.a.b=1.")
_WORKDIR = _define_path("workdir", "Folder of a run: checkpoints, metrics, samples.")
_ON_MODEL = ("sample", "likelihood", "serve", "export")
_MODE = flags.DEFINE_enum(
    "mode", None, [*ON_CONFIG, *_ON_MODEL, "evaluate", "distil", "convert"],
    "The task; if unset, train with --config and sample with a prompt alone.",
)  # fmt: skip
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of several processes.")

# The packaged model, which is used where no other is named.
_PACKAGED = "emoji"
_MODEL = _define_path(
    "model",
    f"{', '.join(_ON_MODEL)}: model folder, or give --workdir; {_PACKAGED} if unset. "
    "distil: the teacher.",
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "sample, likelihood: a text; may be given several times."
)
_PROMPTS = _define_path("prompts", "sample: file of prompts, one on each line.")
_IMAGES = flags.DEFINE_enum("images", "png", ["png", "array_record"], "--prompts: kind of files.")
_OUTPUT = _define_path("output", "sample, evaluate: folder to write; below MODEL if unset.")
_SWEEP = flags.DEFINE_multi_string(
    "sweep",
    [],
    "evaluate: values of a setting, as num_steps=10,25,100; may be given several times.",
)
_GIVEN = _define_path("pictures", "evaluate: a folder of pictures that something else made.")


class _Numbers(flags.ArgumentParser):
    """Numbers with commas between them."""

    def __init__(self, kind: type):
        super().__init__()
        self._kind = kind

    def parse(self, argument):
        return tuple(self._kind(number) for number in argument.split(","))

    def flag_type(self) -> str:
        return "comma-separated numbers"


def _define_numbers(kind: type, name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE(_Numbers(kind), name, None, text)


_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "sample: of each prompt, 4; --prompts: in all."
)
_SAMPLING = [
    _NUM_IMAGES,
    flags.DEFINE_integer("seed", 0, "sample: from 0 to 2**32-1; decides the pictures."),
    flags.DEFINE_integer("num_steps", None, "sample: network calls; the config's if unset."),
    _define_numbers(int, "times", "sample: instead of --num_steps, such as 0,25,100."),
    flags.DEFINE_integer(
        "published_fast", None, "sample: speed of the published fast inference, 2 or more."
    ),
    flags.DEFINE_string("rule", None, "sample: ordinary, high_quality, purity, confidence, ..."),
    flags.DEFINE_integer(
        "calls_per_step", None, "sample: calls that share a step of a rule that reveals tokens."
    ),
    _define_numbers(
        float, "guidance_scale", "sample: 1 is none; 1,3,5 goes by step; the config's if unset."
    ),
    flags.DEFINE_bool("guidance_ramp", False, "sample: guidance rises evenly from 1."),
    _define_numbers(
        float, "guidance_interval", "sample: 0.2,0.8 guides between 20 % and 80 % of the steps."
    ),
    flags.DEFINE_string("negative_prompt", None, "sample: a text that guidance leads away from."),
    flags.DEFINE_float("truncation", None, "sample: 1 is none; the config's if unset."),
    flags.DEFINE_integer("top_k", None, "sample: draw from this many of the likeliest codes."),
    flags.DEFINE_float("temperature", None, "sample: below 1, likely codes become likelier."),
    flags.DEFINE_enum(
        "start", None, ["masked", "schedule"], "sample: first tokens; what suits the rule if unset."
    ),
]
_PICTURES = [
    flags.DEFINE_bool("animate", False, "sample: write the denoising as animations, too."),
    flags.DEFINE_bool("predictions", False, "sample: animate the likeliest codes, too."),
    flags.DEFINE_integer(
        "preview_steps", None, "sample: write preview_seed<seed>.png after every so many calls."
    ),
    _define_paths("mask", "sample: white where --image is painted anew."),
    flags.DEFINE_bool("paste", False, "sample: put what --mask leaves back, at its own size."),
    flags.DEFINE_float(
        "strength", None, "sample: share of noise on --image; 0.5, or with --mask nothing of it."
    ),
]
_IMAGE = _define_paths(
    "image", "sample: picture to begin from; likelihood: to judge. One, or one for each --prompt."
)
_DRAWS = flags.DEFINE_integer(
    "num_draws", None, "likelihood: times that are visited, all if unset; fewer are less exact."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"],
    "sample, likelihood: of the networks, where float32 rounds no product; the config's if unset. "
    "convert: as stored, or float32; export: as stored by vqd_jax, float32 if unset.",
)  # fmt: skip
_LOADING = [
    _DTYPE,
    flags.DEFINE_enum(
        "autoencoder_dtype", "float32", ["float32", "bfloat16"], "sample: of the decoder."
    ),
    _define_numbers(
        int, "mesh", "sample, likelihood: devices along data, fsdp and tensor, such as 1,4,1."
    ),
]
_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: address to listen at.")
_PORT = flags.DEFINE_integer("port", 7860, "serve: port to listen at; 0 takes a free one.")
_TARGET = _define_path("target", "convert, export: file or folder to write.")
_FORMAT = flags.DEFINE_enum(
    "format", "diffusers", ["diffusers", "published", "vqd_jax", "adapters"], "export: layout."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "plan: devices that are not here, such as v5e:4x4 or h100:8."
)
_HBM = flags.DEFINE_float("hbm_gib", None, "plan: GiB of memory of a device; its own if unset.")
_STAGE = flags.DEFINE_enum("stage", "two", ["one", "two"], "plan: one is the autoencoder.")
_SOURCE = _define_path("source", "convert: file, first part of a file, or folder.")
_CONVERSION = [
    flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "convert: averaged weights, or not."),
    _define_path(
        "autoencoder",
        "convert: image tokenizer, if SOURCE has none; export: with a decoder trained further.",
    ),
    _define_path("clip", "convert: CLIP, if SOURCE has none."),
    _define_path("remap", "convert: code remap (.npy, .pt), if not published."),
    flags.DEFINE_integer("num_heads", None, "convert: of the denoiser; config.yaml's, or 16."),
    flags.DEFINE_integer("image_size", None, "convert: side in pixels; else what SOURCE implies."),
]


def main(argv: list[str]) -> None:
    """Runs the task that the flags name."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; every option begins with --")
    prompted = _CONFIG.value is None and (_PROMPT.value or _PROMPTS.value)
    mode = _MODE.value or ("sample" if prompted else "train")
    if mode == "convert":
        source, target = _require(_SOURCE), _require(_TARGET)
        # Imported after the flags are read: --help and mistakes in flags do not wait for JAX.
        from vqd_jax.interop import convert

        dtype = _DTYPE.value or "float32"
        convert.convert(source, target, dtype=dtype, **_values(_CONVERSION))
    elif mode == "evaluate":
        _evaluate(_MODEL.value or _WORKDIR.value)
    elif mode == "distil":
        _distil(_require(_MODEL), _require(_WORKDIR))
    elif mode in _ON_MODEL:
        _use_model(mode, _MODEL.value or _WORKDIR.value or _PACKAGED)
    else:
        _use_config(mode)


def _use_model(mode: str, model_dir: str) -> None:
    from vqd_jax import config as config_lib
    from vqd_jax import modes
    from vqd_jax.parallel import processes

    if mode == "export":
        given = _DTYPE.value, _values(_CONVERSION)["autoencoder"]
        modes.export(model_dir, _require(_TARGET), _FORMAT.value, *given)
        return
    if _CONFIG.value is not None:
        _expand_paths(_CONFIG.value)
        config_lib.validate(_CONFIG.value)
    loading, options = {"model_dir": model_dir, **_values(_LOADING)}, _values(_SAMPLING)
    options |= {"config": _CONFIG.value, "output": _OUTPUT.value} | loading
    with processes.session(_DISTRIBUTED.value):
        if mode == "likelihood":
            judged = _require(_IMAGE), _PROMPT.value, options["seed"], _DRAWS.value
            modes.likelihood(*judged, **loading)
        elif mode == "serve":
            modes.serve(_HOST.value, _PORT.value, **loading)
        elif _PROMPTS.value:
            modes.sample_file(_PROMPTS.value, format=_IMAGES.value, **options)
        else:
            modes.sample(_PROMPT.value, image=_IMAGE.value, **_values(_PICTURES), **options)


def _evaluate(model_dir: str | None) -> None:
    if _NUM_IMAGES.value is not None:
        raise UserError("--num_images belongs to sampling; --config.evaluation.num_generated here")
    from vqd_jax import config as config_lib
    from vqd_jax import modes
    from vqd_jax.parallel import processes

    config = _CONFIG.value
    if config is not None:
        _expand_paths(config)
        config_lib.validate(config, own_tokenizer=True)
    options = {name: v for name, v in _values(_SAMPLING).items() if name != "num_images"}
    with processes.session(_DISTRIBUTED.value):
        modes.evaluate(
            model_dir, config=config, output=_OUTPUT.value, pictures=_GIVEN.value,
            sweep=_SWEEP.value, **options,
        )  # fmt: skip


def _distil(model_dir: str, workdir: str) -> None:
    config = _CONFIG.value
    if config is None:
        raise UserError("--config is missing: a file such as configs/distil.py")
    for flag, field in (("num_images", "distil.num_pairs"), ("seed", "seed")):
        if FLAGS[flag].present:
            raise UserError(f"--{flag} belongs to sampling; --config.{field} here")
    from vqd_jax import config as config_lib
    from vqd_jax import modes
    from vqd_jax.parallel import processes

    # Adapters, which need a model to begin from, begin from the teacher.
    config.training.init_from = config.training.init_from or model_dir
    _expand_paths(config)
    config_lib.validate(config)
    options = {n: v for n, v in _values(_SAMPLING).items() if n not in ("num_images", "seed")}
    with processes.session(_DISTRIBUTED.value):
        modes.distil(config, model_dir, workdir, **options)


def _use_config(mode: str) -> None:
    config = _CONFIG.value
    if config is None:
        raise UserError("--config is missing: a file such as configs/emoji.py")
    workdir = None if mode in ("prepare", "plan") else _require(_WORKDIR)
    if workdir and "://" in workdir:
        raise UserError(
            f"--workdir={workdir}: must be a folder of a file system; checkpoints alone may go to "
            "a bucket, with --config.training.checkpoints"
        )
    if _PROMPT.value:
        raise UserError("--prompt belongs to --mode=sample; --config.sampling.prompts to training")
    from vqd_jax import config as config_lib
    from vqd_jax import modes
    from vqd_jax.parallel import processes

    _expand_paths(config)
    config_lib.validate(config)
    if mode == "plan":
        modes.plan(config, _TOPOLOGY.value, _HBM.value, _STAGE.value)
        return
    config_lib.require_data(config)
    with processes.session(_DISTRIBUTED.value, uses_devices=mode != "prepare"):
        getattr(modes, mode)(config, *([workdir] if workdir else []))


def _expand_paths(config) -> None:
    """Replaces ~ and $VARIABLES in the paths of a config."""
    for key in _PATH_FIELDS:
        section, field = key.split(".")
        value = config[section][field]
        many = isinstance(value, tuple)
        config[section][field] = (
            tuple(map(files.expanded, value)) if many else files.expanded(value)
        )


def _require(flag: flags.FlagHolder) -> str:
    if not flag.value:
        raise UserError(f"--{flag.name} is missing: {FLAGS[flag.name].help}")
    return flag.value


def _values(holders: list[flags.FlagHolder]) -> dict[str, object]:
    return {flag.name: flag.value for flag in holders}


def parse(argv: list[str]) -> list[str]:
    """The flags of a command line, read; ends the program if there is a mistake in them."""
    try:
        return FLAGS(argv)
    except (flags.Error, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        # ml_collections reports unknown and mistyped fields as all of these.
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, KeyError | AttributeError):
            text = f"the config has no such field: {text}"
        console.fail(f"{text} (see --help, and vqd_jax/options.py for the fields)")
    except (SyntaxError, NameError, ImportError) as error:
        console.fail(f"the file of --config fails: {type(error).__name__}: {error}")


def _outside(error: Exception) -> str | None:
    """What to do about an error whose cause is outside the program; None of all others."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first:
        return (
            f"memory is not enough ({first or 'of this machine'}); take fewer pictures at once, or "
            "see what every device needs with --mode=plan"
        )
    return None


def run(argv: list[str]) -> None:
    """``main``, with the mistakes of a user told in one line."""
    try:
        main(argv)
    except (UserError, OSError) as error:
        logging.debug("cause", exc_info=True)
        console.fail(str(error))
    except Exception as error:
        reason = _outside(error)
        if reason is None:
            traceback.print_exc()
            reason = (
                "this is a defect of vqd_jax, not of what you asked for; please report it to the "
                f"project, with the lines above and the command: {' '.join(sys.argv)}"
            )
        console.fail(reason)
    except KeyboardInterrupt:
        console.fail("interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    console.quiet()
    app.run(run, flags_parser=parse)
