"""What every config has: the fields, what they mean, and which values are possible.

A config file in ``configs/`` starts from ``default_config()`` and changes what it wants. The
command line changes single fields (``--config.training.num_steps=500``). ``validate`` turns
impossible values into errors that name the key.

Every field stands once, in a dataclass that checks its own values. The sizes of the networks are
those of ``AutoencoderConfig``, ``TextEncoderConfig`` and ``DenoiserConfig``, in ``vqd_jax/models``;
all others stand here.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from vqd_jax import files
from vqd_jax.diffusion import schedule
from vqd_jax.errors import UserError, require_at_least
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.models.conditioned import ConditionedDenoiserConfig
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

VOCAB_SIZE = 49408
# What ``config.json`` of a model folder says of itself, beside the fields below.
MODEL_KIND = "vqd_jax"
DATA_SETS = (
    "emoji_text",
    "shapes_text",
    "coco_text",
    "cub_text",
    "oxford102_text",
    "imagenet_class",
    "ffhq_images",
    "image_text_folder",
    "shapes_text/32px",
    "shapes_text/64px",
    "cub_text/official",
    "cub_text/published",
)
# The sets that this program makes itself; all others are made from files that the user has.
_MADE_HERE = ("emoji_text", "shapes_text")
# The end points of the keep and mask probabilities; a cosine has none.
SCHEDULES = {
    "released": (schedule.RELEASED_KEEP, schedule.RELEASED_MASK),
    "paper": (schedule.PAPER_KEEP, schedule.PAPER_MASK),
    "cosine": ((), ()),
}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which pictures a model learns from, and how they are prepared. Errors as in ``validate``."""

    name: str = "emoji_text"  # one of DATA_SETS
    # The publisher's files. Sets that this program makes itself are prepared there.
    dir: str = ""
    prepared_dir: str = ""  # where a set made from files is prepared; '' is data.dir
    beam: str = ""  # options of the Apache Beam pipeline that prepares the set; '' uses none
    codes: str = ""  # where --mode=encode has cached the codes; '' is in the workdir
    more_codes: tuple[str, ...] = ()  # folders of more codes to mix in, from the same autoencoder
    # Shares of the set and of each folder of more_codes in training; () goes by their sizes.
    weights: tuple[float, ...] = ()
    # Keep text features beside the codes, so that training need not run a pretrained CLIP.
    cache_text_features: bool = False
    random_crop: bool = False  # crop training pictures at random before encoding, as published
    flip: bool = False  # mirror half of the crops; not where captions say left or right
    num_crops: int = 1  # cached crops of each training picture
    image_size: int = 32  # side of a picture, in pixels
    max_bad_share: float = 0.01  # a run stops at a larger share of unreadable records

    def __post_init__(self):
        require_at_least(self, image_size=1, num_crops=1)
        _require_shares(self, "max_bad_share")
        _require_choice("name", self.name, DATA_SETS)
        if self.weights and len(self.weights) != 1 + len(self.more_codes):
            raise ValueError(
                f"weights={self.weights}: must have one share for the set of the config and one "
                f"for each of config.data.more_codes={self.more_codes}"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights={self.weights}: must be positive")


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """How the image tokenizer is trained, by Adam. Errors as in ``validate``."""

    num_steps: int = 1000  # of a linear warm-up and a cosine down to 0
    batch_size: int = 8
    learning_rate: float = 2e-3  # the peak
    warmup_steps: int = 50
    # Share s of squared error in the reconstruction loss (1 - s) mean|d| + s mean d^2, where d is
    # the error of a pixel value in [-1, 1].
    squared_weight: float = 1.0
    commitment: float = 0.25  # weight of the commitment term
    codebook_decay: float = 0.95  # of the moving average that the codebook is
    revival_threshold: float = 0.3  # a code used less than this share of the mean is seeded anew

    def __post_init__(self):
        require_at_least(self, num_steps=1, batch_size=1, commitment=0)
        _require_positive(self, "learning_rate")
        if not 0 <= self.warmup_steps < self.num_steps:
            under = f"must be at least 0 and under num_steps={self.num_steps}"
            raise ValueError(f"warmup_steps={self.warmup_steps}: {under}")
        _require_decays(self, "codebook_decay", "revival_threshold")
        _require_shares(self, "squared_weight")


@dataclasses.dataclass(frozen=True)
class DiffusionOptions:
    """The noise. Errors as in ``validate``."""

    schedule: str = "released"  # one of SCHEDULES
    num_steps: int = 100  # T
    # Probabilities at times 1 and T that a token was kept, and that it is masked; () takes those of
    # the schedule.
    keep: tuple[float, ...] = ()
    mask: tuple[float, ...] = ()

    def __post_init__(self):
        require_at_least(self, num_steps=1)
        _require_choice("schedule", self.schedule, SCHEDULES)
        for name in ("keep", "mask"):
            points = getattr(self, name)
            if points and (len(points) != 2 or self.schedule == "cosine"):
                raise ValueError(
                    f"{name}={points}: must be two probabilities, at times 1 and T, or () for "
                    "those of the schedule; a cosine schedule has no others"
                )


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How the denoiser is trained, by AdamW. Errors as in ``validate``."""

    init_from: str = ""  # trained weights to begin from (fine-tuning); '' begins anew
    num_steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3  # the peak
    warmup_steps: int = 100  # a shorter run warms up to its end
    final_learning_rate: float = 0.05  # share of the peak at the end of a cosine
    adam_b1: float = 0.9
    adam_b2: float = 0.96
    weight_decay: float = 0.045
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    null_text_rate: float = 0.1  # share of captions that are emptied, for guidance
    auxiliary_weight: float = 5e-4  # lambda of the x_0 term
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 200
    keep_checkpoints: int = 2
    checkpoints: str = ""  # where they are, 'gs://...' too; '' is in the workdir
    gradient_accumulation: int = 1  # parts of a batch, computed one after the other
    steps_per_call: int = 1  # steps in one program; more keep a fast device busy
    profile_steps: int = 0  # steps of every start that are traced to WORKDIR/profile

    def __post_init__(self):
        require_at_least(
            self, num_steps=1, batch_size=1, warmup_steps=0, log_every=1, eval_every=1,
            save_every=1, keep_checkpoints=1, gradient_accumulation=1, steps_per_call=1,
            profile_steps=0, auxiliary_weight=0, weight_decay=0,
        )  # fmt: skip
        _require_positive(self, "learning_rate", "clip_norm")
        _require_shares(self, "null_text_rate", "final_learning_rate")
        _require_decays(self, "ema_decay", "adam_b1", "adam_b2")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Devices along every axis; -1 is what the others leave. See ``parallel/sharding.py``."""

    data: int = -1  # copies of the model, each with its part of the batch
    fsdp: int = 1  # parts of the model, which divide the batch too
    tensor: int = 1  # parts of every layer's heads and hidden units

    def __post_init__(self):
        for axis, size in dataclasses.asdict(self).items():
            if size == 0 or size < -1:
                raise ValueError(
                    f"{axis}={size}: must be at least 1, or -1 for what the other axes leave"
                )


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """How the likelihood of pictures is bounded. Errors as in ``validate``."""

    num_images: int = 176  # from each split
    num_draws: int = 10  # draws of noise for each picture

    def __post_init__(self):
        require_at_least(self, num_images=2, num_draws=2)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How pictures are drawn unless a request says otherwise. Errors as in ``validate``."""

    prompts: tuple[str, ...] = ("red heart", "grinning face", "a black cat", "")
    images_per_prompt: int = 4
    num_steps: int = 0  # network calls; 0 is T
    rule: str = "ordinary"  # what a step does; see diffusion/choices.py
    guidance_scale: float = 3.0
    truncation: float = 0.9  # 1 keeps every code

    def __post_init__(self):
        require_at_least(self, images_per_prompt=1, num_steps=0, guidance_scale=0)
        _require_positive(self, "truncation")
        if not self.prompts or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("prompts: give at least one text; an empty one will do")


OPTIONS = {
    "data": DataOptions,
    "diffusion": DiffusionOptions,
    "training": TrainingOptions,
    "mesh": MeshOptions,
    "evaluation": EvaluationOptions,
    "sampling": SamplingOptions,
}


def _require_positive(options: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"{name}={getattr(options, name)}: must be positive")


def _require_shares(options: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name}={getattr(options, name)}: must lie in 0..1")


def _require_decays(options: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)}: must be at least 0 and below 1")


def _require_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def default_config() -> ConfigDict:
    """Every field of a config, with values small enough for a CPU."""
    codec = AutoencoderConfig(
        image_size=32, channels=16, channel_multipliers=(1, 2, 4), num_res_blocks=1,
        attention_resolutions=(), latent_channels=64, codebook_dim=8, num_codes=512, norm_groups=8,
    )  # fmt: skip
    text = TextEncoderConfig(VOCAB_SIZE, context_length=77, width=64, num_layers=2, num_heads=2)
    denoiser = DenoiserConfig(
        num_codes=512, grid=(8, 8), num_steps=100, width=128, num_layers=6, num_heads=4,
        text_width=64,
    )  # fmt: skip
    sections = {name: _fields(options()) for name, options in OPTIONS.items()}
    # A path names trained weights; '' trains them here. An autoencoder is a model folder or a
    # workdir. A text encoder is a converted CLIP, which stays as it is. A config has no None.
    sections["autoencoder"] = (
        {"path": ""} | _fields(codec, "image_size") | _fields(AutoencoderOptions())
    ) | {"codebook_size": 0}
    sections["text_encoder"] = {"path": ""} | _fields(text, "dtype")
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
    "mesh.",
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
    try:
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is not a config that this program wrote: {error}") from error
    return from_dict(stored, path)


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
        flat = flatten(config).items()
        return {k: v for k, v in flat if k.startswith(sections) and not k.startswith(MAY_CHANGE)}

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
    text_encoder = _build(TextEncoderConfig, config.text_encoder, dtype=c.dtype)
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
