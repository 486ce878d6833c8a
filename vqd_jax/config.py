"""What every config has: the fields, what they mean, and which values are possible.

A config file in ``configs/`` starts from ``default_config()`` and changes what it wants; the
command line changes single fields (``--config.training.num_steps=500``). ``validate`` turns
impossible values into errors that name the key.
"""

import json
import math

from ml_collections import ConfigDict

from vqd_jax.diffusion import schedule
from vqd_jax.errors import UserError
from vqd_jax.models.attention import REMAT_POLICIES
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.models.conditioned import ConditionedDenoiserConfig
from vqd_jax.models.denoiser import CONDITIONS, DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig
from vqd_jax.training.autoencoder import AutoencoderOptions

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
SCHEDULES = {"released": schedule.released, "paper": schedule.paper}


def default_config() -> ConfigDict:
    """Every field of a config, with values small enough for a CPU."""
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "emoji_text"  # one of DATA_SETS
    config.data.dir = ""  # the publisher's files; of emoji and shapes, where they are prepared
    config.data.prepared_dir = ""  # where sets made from files are prepared; '' is data.dir
    config.data.beam = ""  # options of the Apache Beam pipeline that prepares the set; '' is none
    config.data.codes = ""  # codes cached by --mode=encode; '' is in the workdir
    config.data.more_codes = ()  # folders of further codes, of the same autoencoder, to mix in
    config.data.weights = ()  # shares of the set and of more_codes in training; () is by size
    config.data.cache_text_features = False  # beside the codes: training skips a pretrained CLIP
    config.data.random_crop = False  # the published jitter, when codes are cached for training
    config.data.flip = False  # mirror half of the crops; not where captions say left or right
    config.data.num_crops = 1  # crops of a training picture that are cached
    config.data.image_size = 32  # pixels a side
    config.data.max_bad_share = 0.01  # share of unreadable records that stops a run

    # Stage one: images <-> codes.
    config.autoencoder = ConfigDict()
    config.autoencoder.path = ""  # a trained one (model folder or workdir); '' trains it here
    config.autoencoder.channels = 16
    config.autoencoder.channel_multipliers = (1, 2, 4)  # one a level; each further one halves
    config.autoencoder.num_res_blocks = 1
    config.autoencoder.attention_resolutions = ()
    config.autoencoder.latent_channels = 64
    config.autoencoder.codebook_dim = 8
    config.autoencoder.num_codes = 512  # K
    config.autoencoder.codebook_size = 0  # where codes are remapped to fewer ids, K; 0 is K
    config.autoencoder.quantizer = "nearest"  # or 'gumbel', of converted ones only
    config.autoencoder.norm_groups = 8
    config.autoencoder.num_steps = 1000
    config.autoencoder.batch_size = 8
    config.autoencoder.learning_rate = 2e-3
    config.autoencoder.warmup_steps = 50
    config.autoencoder.squared_weight = 1.0  # share of squared error in the reconstruction loss
    config.autoencoder.commitment = 0.25
    config.autoencoder.codebook_decay = 0.95
    config.autoencoder.revival_threshold = 0.3

    config.text_encoder = ConfigDict()
    config.text_encoder.path = ""  # a converted CLIP, which stays as it is; '' trains one here
    config.text_encoder.vocab_size = VOCAB_SIZE
    config.text_encoder.context_length = 77  # ids a caption; longer ones are cut
    config.text_encoder.width = 64
    config.text_encoder.num_layers = 2
    config.text_encoder.num_heads = 2
    config.text_encoder.normalize = False  # length 1 a position, as with pretrained CLIP

    config.denoiser = ConfigDict()
    config.denoiser.width = 128
    config.denoiser.num_layers = 6
    config.denoiser.num_heads = 4
    config.denoiser.condition = "text"  # 'text', 'class' or 'none'
    config.denoiser.num_classes = 0  # of a class-conditional model
    config.denoiser.learned_null = False  # the empty caption (or no class) has features of its own
    config.denoiser.mlp = "fc"  # 'fc' or 'conv': 3x3 convolutions over the grid
    config.denoiser.mlp_ratio = 4
    config.denoiser.position_table = ()  # rows and columns; () is the grid
    config.denoiser.remat = "none"  # 'none', 'dots' or 'full'
    config.denoiser.scan_unroll = 1  # layers in a turn of the loop; see docs/performance.md
    config.denoiser.init_std = 0.02  # of the initial weights
    config.denoiser.dtype = "float32"  # compute dtype: 'float32' or 'bfloat16'

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "released"  # 'released' or 'paper'
    config.diffusion.num_steps = 100  # T

    config.training = ConfigDict()
    config.training.init_from = ""  # a model folder to go on from (fine-tuning); '' is nothing
    config.training.num_steps = 1000
    config.training.batch_size = 32
    config.training.learning_rate = 1e-3
    config.training.warmup_steps = 100  # a shorter run warms up to its end
    config.training.final_learning_rate = 0.05  # share of the peak left at the end (cosine)
    config.training.adam_b1 = 0.9
    config.training.adam_b2 = 0.96
    config.training.weight_decay = 0.045
    config.training.clip_norm = 1.0
    config.training.ema_decay = 0.99
    config.training.null_text_rate = 0.1  # share of captions emptied, for guidance
    config.training.auxiliary_weight = 5e-4  # lambda of the x_0 term
    config.training.log_every = 10
    config.training.eval_every = 500
    config.training.save_every = 200
    config.training.keep_checkpoints = 2
    config.training.checkpoints = ""  # where they are, 'gs://...' too; '' is in the workdir
    config.training.gradient_accumulation = 1  # parts that a batch is worked through in
    config.training.steps_per_call = 1  # steps in one program; more keep a fast device busy
    config.training.profile_steps = 0  # trace so many steps of a start to WORKDIR/profile

    # Devices along every axis; -1 is what the others leave. See parallel/sharding.py.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # copies of the model, each with its part of the batch
    config.mesh.fsdp = 1  # parts of the model, which split the batch too
    config.mesh.tensor = 1  # parts of every layer's heads and hidden units

    config.evaluation = ConfigDict()
    config.evaluation.num_images = 176  # pictures of each split whose likelihood is bounded
    config.evaluation.num_draws = 10  # times drawn a picture

    config.sampling = ConfigDict()
    config.sampling.prompts = ("red heart", "grinning face", "a black cat", "")
    config.sampling.images_per_prompt = 4
    config.sampling.num_steps = 0  # network calls; 0 is T
    config.sampling.rule = "ordinary"  # what a step does; pipeline.RULES
    config.sampling.guidance_scale = 3.0
    config.sampling.truncation = 0.9  # 1 keeps every code
    return config


# What may differ when a run is continued: it changes neither the model nor what it learns from.
# (Another number of steps or learning rate bends the schedule from there on.)
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
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


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
    """The config of ``config.to_dict()``, as JSON keeps it.

    Raises:
      UserError: it is no such thing, or holds impossible values; the message names ``source``.
    """
    config = default_config()
    try:
        stored = {key: value for key, value in stored.items() if key != "kind"}
        for key, value in _flatten_dict(stored).items():
            known = flatten(config)
            if key not in known:
                raise UserError(f"{source}: unknown config key {key!r}")
            config.update_from_flattened_dict({key: _like(known[key], value)})
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not a config that this program wrote: {error}") from error
    config.lock()
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return config


def _flatten_dict(nested: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten_dict(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _like(default, value):
    return tuple(value) if isinstance(value, list) or isinstance(default, list) else value


def differences(old: ConfigDict, new: ConfigDict, sections: tuple[str, ...] = ("",)) -> list[str]:
    """'key: old -> new' for every field that differs and may not change in a continued run.

    Only keys that begin with one of ``sections`` count.
    """
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key.startswith(sections) and not key.startswith(MAY_CHANGE)
    ]


def autoencoder_config(config: ConfigDict) -> AutoencoderConfig:
    """Sizes of the image tokenizer."""
    c = config.autoencoder
    return AutoencoderConfig(
        image_size=config.data.image_size,
        channels=c.channels,
        channel_multipliers=tuple(c.channel_multipliers),
        num_res_blocks=c.num_res_blocks,
        attention_resolutions=tuple(c.attention_resolutions),
        latent_channels=c.latent_channels,
        codebook_dim=c.codebook_dim,
        num_codes=c.num_codes,
        codebook_size=c.codebook_size or None,
        quantizer=c.quantizer,
        norm_groups=c.norm_groups,
    )


def autoencoder_options(config: ConfigDict) -> AutoencoderOptions:
    """How the image tokenizer is trained."""
    c = config.autoencoder
    return AutoencoderOptions(
        steps=c.num_steps,
        learning_rate=c.learning_rate,
        warmup_steps=min(c.warmup_steps, c.num_steps - 1),
        squared_weight=c.squared_weight,
        commitment=c.commitment,
        codebook_decay=c.codebook_decay,
        revival_threshold=c.revival_threshold,
    )


def model_config(config: ConfigDict) -> ConditionedDenoiserConfig:
    """Sizes of the text encoder and the denoiser."""
    text, denoiser = config.text_encoder, config.denoiser
    grid = autoencoder_config(config).grid_size
    has_text = denoiser.condition == "text"
    text_encoder = TextEncoderConfig(
        vocab_size=text.vocab_size,
        context_length=text.context_length,
        width=text.width,
        num_layers=text.num_layers,
        num_heads=text.num_heads,
        normalize=text.normalize,
        dtype=denoiser.dtype,
    )
    return ConditionedDenoiserConfig(
        text_encoder=text_encoder if has_text else None,
        freeze_text_encoder=has_text and bool(text.path),
        denoiser=DenoiserConfig(
            num_codes=config.autoencoder.num_codes,
            grid=(grid, grid),
            num_steps=config.diffusion.num_steps,
            width=denoiser.width,
            num_layers=denoiser.num_layers,
            num_heads=denoiser.num_heads,
            condition=denoiser.condition,
            text_width=text.width if has_text else 0,
            num_classes=denoiser.num_classes,
            learned_null=denoiser.learned_null,
            mlp=denoiser.mlp,
            mlp_ratio=denoiser.mlp_ratio,
            position_table=tuple(denoiser.position_table) or None,
            remat=denoiser.remat,
            scan_unroll=denoiser.scan_unroll,
            init_std=denoiser.init_std,
            dtype=denoiser.dtype,
        ),
    )


def noise_schedule(config: ConfigDict) -> schedule.Schedule:
    """The schedule that the config names."""
    return SCHEDULES[config.diffusion.schedule](
        config.diffusion.num_steps, config.autoencoder.num_codes
    )


def validate(config: ConfigDict) -> None:
    """Raises ``UserError`` that names the key of the first impossible value."""
    at_least = {
        "data.image_size": 1,
        "data.num_crops": 1,
        "text_encoder.context_length": 3,
        "text_encoder.width": 1,
        "text_encoder.num_layers": 1,
        "text_encoder.num_heads": 1,
        "denoiser.width": 1,
        "denoiser.num_layers": 1,
        "denoiser.num_heads": 1,
        "denoiser.mlp_ratio": 1,
        "denoiser.num_classes": 0,
        "text_encoder.vocab_size": 3,
        "denoiser.scan_unroll": 1,
        "diffusion.num_steps": 1,
        "training.num_steps": 1,
        "training.batch_size": 1,
        "training.warmup_steps": 0,
        "autoencoder.num_steps": 1,
        "autoencoder.warmup_steps": 0,
        "training.log_every": 1,
        "training.eval_every": 1,
        "training.save_every": 1,
        "training.keep_checkpoints": 1,
        "training.gradient_accumulation": 1,
        "training.steps_per_call": 1,
        "training.profile_steps": 0,
        "training.auxiliary_weight": 0,
        "training.weight_decay": 0,
        "autoencoder.batch_size": 1,
        "evaluation.num_images": 2,
        "evaluation.num_draws": 2,
        "sampling.images_per_prompt": 1,
        "sampling.num_steps": 0,
        "sampling.guidance_scale": 0,
        "autoencoder.commitment": 0,
        "seed": 0,
    }
    flat = flatten(config)
    for key, least in at_least.items():
        if not flat[key] >= least or not math.isfinite(flat[key]):
            raise UserError(f"config.{key}={flat[key]}: must be at least {least}")
    for key in (
        "autoencoder.learning_rate",
        "denoiser.init_std",
        "training.learning_rate",
        "training.clip_norm",
        "sampling.truncation",
    ):
        if not flat[key] > 0 or not math.isfinite(flat[key]):
            raise UserError(f"config.{key}={flat[key]}: must be positive")
    for key in ("training.null_text_rate", "training.final_learning_rate", "data.max_bad_share"):
        if not 0 <= flat[key] <= 1:
            raise UserError(f"config.{key}={flat[key]}: must lie in 0..1")
    for key in ("training.ema_decay", "training.adam_b1", "training.adam_b2"):
        if not 0 <= flat[key] < 1:
            raise UserError(f"config.{key}={flat[key]}: must be at least 0 and below 1")
    if not config.sampling.prompts or not all(isinstance(p, str) for p in config.sampling.prompts):
        raise UserError("config.sampling.prompts: give at least one text; an empty one will do")
    choices = {
        "data.name": DATA_SETS,
        "diffusion.schedule": SCHEDULES,
        "denoiser.condition": CONDITIONS,
        "denoiser.mlp": ("fc", "conv"),
        "denoiser.remat": REMAT_POLICIES,
        "denoiser.dtype": ("float32", "bfloat16"),
    }
    for key, names in choices.items():
        if flat[key] not in names:
            raise UserError(f"config.{key}={flat[key]!r}: must be one of {', '.join(names)}")
    for axis in ("data", "fsdp", "tensor"):
        if flat[f"mesh.{axis}"] == 0 or flat[f"mesh.{axis}"] < -1:
            raise UserError(
                f"config.mesh.{axis}={flat[f'mesh.{axis}']}: must be at least 1, or -1 for "
                "what the other axes leave"
            )
    if config.data.weights and len(config.data.weights) != 1 + len(config.data.more_codes):
        raise UserError(
            f"config.data.weights={config.data.weights}: one share for the set of the config and "
            f"one for each of config.data.more_codes={config.data.more_codes}"
        )
    if not all(0 < weight < math.inf for weight in config.data.weights):
        raise UserError(f"config.data.weights={config.data.weights}: must be positive")
    if config.data.cache_text_features and not (
        config.text_encoder.path and config.denoiser.condition == "text"
    ):
        raise UserError(
            "config.data.cache_text_features: only features of a pretrained text encoder stay as "
            "they are; name one with config.text_encoder.path"
        )
    if config.seed >= 2**32:
        raise UserError(f"config.seed={config.seed}: must lie in 0..2**32-1")
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
    for section, build in (
        ("autoencoder", autoencoder_config),
        ("autoencoder", autoencoder_options),
        ("", model_config),
        ("diffusion", noise_schedule),
    ):
        try:
            build(config)
        except ValueError as error:
            prefix = "config." + (f"{section}: " if section else "")
            raise UserError(f"{prefix}{error}") from error
