"""What every config has: the fields, what they mean, and which values are possible.

A config file in ``configs/`` starts from ``default_config()`` and changes what it wants. The
command line changes single fields (``--config.training.num_steps=500``). ``validate`` turns
impossible values into errors that name the key.

Every field stands once, in a dataclass that checks its own values. The sizes of the networks are
those of ``AutoencoderConfig``, ``TextEncoderConfig`` and ``DenoiserConfig``, in ``vqd_jax/models``;
all others stand in ``vqd_jax/options.py``.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from vqd_jax import files
from vqd_jax.diffusion import schedule
from vqd_jax.errors import UserError
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.models.conditioned import ConditionedDenoiserConfig
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig
from vqd_jax.options import OPTIONS, SCHEDULES, AutoencoderOptions

VOCAB_SIZE = 49408
# What ``config.json`` of a model folder says of itself, beside the fields below.
MODEL_KIND = "vqd_jax"
# The sets that this program makes itself; all others are made from files that the user has.
_MADE_HERE = ("emoji_text", "shapes_text")


def default_config() -> ConfigDict:
    """Every field of a config, with values small enough for a CPU."""
    codec = AutoencoderConfig(
        image_size=32, channels=16, channel_multipliers=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(), latent_channels=64, codebook_dim=8, num_codes=512, norm_groups=8,
    )  # fmt: skip
    text = TextEncoderConfig(VOCAB_SIZE, context_length=77, width=64, num_layers=2, num_heads=2)
    denoiser = DenoiserConfig(
        num_codes=512, grid=(8, 8), num_steps=100, width=128, num_layers=6, num_heads=4,
        text_width=64, product_dtype="auto",
    )  # fmt: skip
    sections = {name: _fields(options()) for name, options in OPTIONS.items()}
    # A path names trained weights; '' trains them here. An autoencoder is a model folder or a
    # workdir. A text encoder is a converted CLIP, which stays as it is. A config has no None.
    sections["autoencoder"] = (
        {"path": ""} | _fields(codec, "image_size") | _fields(AutoencoderOptions())
    ) | {"codebook_size": 0}
    sections["text_encoder"] = {"path": ""} | _fields(text, "dtype", "product_dtype")
    derived = ("num_codes", "grid", "num_steps", "text_width")
    sections["denoiser"] = _fields(denoiser, *derived) | {"position_table": ()}
    order = ("data", "autoencoder", "text_encoder", "denoiser", *OPTIONS)
    return ConfigDict({"seed": 0} | {name: sections[name] for name in order})


def _fields(instance: Any, *without: str) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(instance)]
    return {name: getattr(instance, name) for name in names if name not in without}


def _build(cls: type, section: ConfigDict, **others: Any) -> Any:
    """A dataclass whose fields are those of a section and ``others``."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in section.items() if name in names} | others)


# What may differ when a run is continued: it changes neither the model nor what it learns from.
# Another number of steps or learning rate bends the schedule from there on.
MAY_CHANGE = (
    "data.dir",
    "data.prepared_dir",
    "data.codes",
    "data.beam",
    "data.max_bad_share",
    "autoencoder.path",
    "autoencoder.learning_rate",
    "autoencoder.discriminator_learning_rate",
    "autoencoder.clip_norm",
    "autoencoder.perceptual_path",
    "autoencoder.gradient_accumulation",
    "autoencoder.steps_per_call",
    "autoencoder.profile_steps",
    "autoencoder.remat",
    "autoencoder.init_from",
    "training.init_from",
    "training.learning_rate",
    "training.clip_norm",
    "training.num_steps",
    "training.log_every",
    "training.eval_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.checkpoints",
    "training.gradient_accumulation",
    "training.steps_per_call",
    "training.profile_steps",
    "training.evaluate_with",
    "training.evaluate_pictures",
    "training.best_metric",
    "mesh.",
    "denoiser.product_dtype",
    "denoiser.remat",
    "denoiser.scan_unroll",
    "evaluation.",
    "sampling.",
)


def flatten(config: ConfigDict) -> dict[str, object]:
    """{'training.num_steps': 1000, ...}; tuples become lists, as JSON has them."""
    flat = files.flatten(config.to_dict())
    return {key: list(v) if isinstance(v, tuple) else v for key, v in flat.items()}


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, keys in order."""
    return json.dumps(config.to_dict(), indent=2)


def load(path: str) -> ConfigDict:
    """The config in a file that ``to_json`` wrote.

    Raises:
      UserError: it is not such a file, or holds impossible values; the message names the file.
    """
    return from_dict(files.read_json(path, "it is not a config that this program wrote"), path)


def from_dict(stored: dict, source: str) -> ConfigDict:
    """The config of ``config.to_dict()``, as JSON keeps it. Fields it lacks have their defaults.

    Raises:
      UserError: it is no such thing, or holds impossible values; the message names ``source``.
    """
    config = default_config()
    known = flatten(config)
    try:
        for key, value in files.flatten(stored).items():
            if key == "kind":
                continue
            if key not in known:
                raise UserError(f"{source}: unknown config key {key!r}")
            if isinstance(value, list) or isinstance(known[key], list):
                value = tuple(value)
            config.update_from_flattened_dict({key: value})
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not a config that this program wrote: {error}") from error
    config.lock()
    try:
        validate(config, own_tokenizer="kind" in stored)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return config


def differences(old: ConfigDict, new: ConfigDict, sections: tuple[str, ...] = ("",)) -> list[str]:
    """'key: old -> new' for every field that differs and may not change in a continued run.

    Only keys that begin with one of ``sections`` count.
    """

    def decisive(config):
        flat = {k: v for k, v in flatten(config).items() if not k.startswith(MAY_CHANGE)}
        # What a path leads to may move, and is compared where it is read.
        flat["text_encoder.path"] = bool(flat["text_encoder.path"])
        return {k: v for k, v in flat.items() if k.startswith(sections)}

    return files.differences(decisive(old), decisive(new))


def autoencoder_config(config: ConfigDict) -> AutoencoderConfig:
    """Sizes of the image tokenizer."""
    return _build(
        AutoencoderConfig,
        config.autoencoder,
        image_size=config.data.image_size,
        codebook_size=config.autoencoder.codebook_size or None,
    )


def autoencoder_options(config: ConfigDict) -> AutoencoderOptions:
    """How the image tokenizer is trained; a run shorter than its warm-up warms up to its end."""
    c = config.autoencoder
    return _build(AutoencoderOptions, c, warmup_steps=min(c.warmup_steps, max(c.num_steps - 1, 0)))


def model_config(config: ConfigDict) -> ConditionedDenoiserConfig:
    """Sizes of the text encoder and the denoiser."""
    c = config.denoiser
    grid = autoencoder_config(config).grid_size
    has_text = c.condition == "text"
    dtypes = {"dtype": c.dtype, "product_dtype": c.product_dtype}
    text_encoder = _build(TextEncoderConfig, config.text_encoder, **dtypes)
    denoiser = _build(
        DenoiserConfig,
        c,
        num_codes=config.autoencoder.num_codes,
        grid=(grid, grid),
        num_steps=config.diffusion.num_steps,
        text_width=text_encoder.width if has_text else 0,
        position_table=tuple(c.position_table) or None,
    )
    return ConditionedDenoiserConfig(
        text_encoder=text_encoder if has_text else None,
        denoiser=denoiser,
        freeze_text_encoder=has_text and bool(config.text_encoder.path),
    )


def noise_schedule(config: ConfigDict) -> schedule.Schedule:
    """The schedule that the config names, between its own end points if it gives any."""
    c, num_codes = config.diffusion, config.autoencoder.num_codes
    if c.schedule == "cosine":
        return schedule.cosine(c.num_steps, num_codes)
    keep, mask = SCHEDULES[c.schedule]
    return schedule.linear(c.num_steps, num_codes, tuple(c.keep) or keep, tuple(c.mask) or mask)


def has_released_schedule(config: ConfigDict) -> bool:
    """Whether the noise is that of the published weights, which other programs have built in."""
    c = config.diffusion
    return c.schedule == "released" and not c.keep and not c.mask


@contextlib.contextmanager
def _naming(section: str) -> Iterator[None]:
    """Turns a ``ValueError`` that begins with a field into a ``UserError`` that names the key."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("image_size"):
            section = "data."
        raise UserError(f"config.{section}{error}") from error


def validate(config: ConfigDict, *, own_tokenizer: bool = False) -> None:
    """Raises ``UserError`` that names the key of the first impossible value.

    Args:
      config: any config.
      own_tokenizer: the model comes with a text tokenizer, as converted ones do; else captions have
        the ids of the packaged one.
    """
    for section, options in OPTIONS.items():
        with _naming(f"{section}."):
            _build(options, config[section])
    with _naming("autoencoder."):
        autoencoder_config(config), autoencoder_options(config)
    # The messages of these name their section.
    with _naming(""):
        model_config(config)
    with _naming("diffusion: "):
        noise_schedule(config)
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed={config.seed}: must be at least 0 and below 2**32")
    has_text = config.denoiser.condition == "text"
    if config.data.cache_text_features and not (config.text_encoder.path and has_text):
        raise UserError(
            "config.data.cache_text_features: only features of a pretrained text encoder stay as "
            "they are; name one with config.text_encoder.path"
        )
    if has_text and not own_tokenizer and config.text_encoder.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"config.text_encoder.vocab_size={config.text_encoder.vocab_size}: must be at least "
            f"{VOCAB_SIZE}, the ids of the text tokenizer"
        )
    if config.sampling.num_steps > config.diffusion.num_steps:
        raise UserError(
            f"config.sampling.num_steps={config.sampling.num_steps}: must not exceed "
            f"config.diffusion.num_steps={config.diffusion.num_steps}"
        )
    if config.autoencoder.num_codes > 2**16:
        raise UserError(
            f"config.autoencoder.num_codes={config.autoencoder.num_codes}: must be at most 65536, "
            "since codes are cached as uint16"
        )


def require_data(config: ConfigDict) -> None:
    """Raises ``UserError`` if the config does not say where the files of its data set are."""
    if not config.data.dir and config.data.name.partition("/")[0] not in _MADE_HERE:
        raise UserError(
            f"config.data.dir is empty: {config.data.name} is made from its publisher's files, and "
            "it must name their directory"
        )
