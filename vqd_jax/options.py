"""The sections of a config that belong to no network: their fields, defaults and checks.

Every field stands once, in a dataclass that checks its own values; ``vqd_jax/config.py`` puts them
together with those of the networks.
"""

import dataclasses
import math
import re
from typing import Any

from vqd_jax.diffusion import choices, schedule
from vqd_jax.errors import require_at_least, require_choice
from vqd_jax.models.discriminator import DiscriminatorConfig
from vqd_jax.models.perceptual import PerceptualConfig

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
# Networks of the perceptual distance; "random" is squeezenet with random weights.
PERCEPTUAL = ("squeezenet", "random", "vgg16")
# How the denoiser learns.
OPTIMIZERS = ("adamw", "muon")
# Distances that an evaluation can measure, and networks for their features that need no file.
METRICS = ("frechet", "kid", "neighbours", "copies", "retrieval")
FEATURES = ("efficientnet", "mobilenet", "random", "none")
# What the best model of a run can be chosen by, and whether more of it is better.
BEST_METRICS = {
    "validation/bits_per_token": False,
    "validation/kid": False,
    "validation/precision": True,
    "validation/recall": True,
    "validation/density": True,
    "validation/coverage": True,
    "validation/attributes": True,
}
# The end points of the keep and mask probabilities; a cosine has none.
SCHEDULES = {
    "released": (schedule.RELEASED_KEEP, schedule.RELEASED_MASK),
    "paper": (schedule.PAPER_KEEP, schedule.PAPER_MASK),
    "cosine": ((), ()),
}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which pictures a model learns from; errors as in ``config.validate``."""

    name: str = "emoji_text"  # one of DATA_SETS
    # The publisher's files. Sets that this program makes itself are prepared there.
    dir: str = ""
    prepared_dir: str = ""  # where a set made from files is prepared; '' is data.dir
    beam: str = ""  # options of the Apache Beam pipeline that prepares the set; '' uses none
    codes: str = ""  # where --mode=encode has cached the codes; '' is in the workdir
    more_codes: tuple[str, ...] = ()  # folders of more codes to mix in, from the same autoencoder
    # Shares of the set and of each folder of more_codes in training; () goes by their sizes.
    weights: tuple[float, ...] = ()
    # Training takes records so that each value of this feature of the set, such as "concept", has a
    # share of n^balance_power, n its number of records; '' takes all records equally often.
    balance_by: str = ""
    balance_power: float = 0.5  # 1 is as without it, 0 gives all values the same share
    hold_out: tuple[str, ...] = ()  # captions whose training pictures are never taken
    # Keep text features beside the codes, so that training need not run a pretrained CLIP.
    cache_text_features: bool = False
    random_crop: bool = False  # crop training pictures at random before encoding, as published
    flip: bool = False  # mirror half of the crops; not where captions say left or right
    num_crops: int = 1  # cached crops of each training picture
    image_size: int = 32  # side of a picture, in pixels
    max_bad_share: float = 0.01  # a run stops at a larger share of unreadable records

    def __post_init__(self):
        require_at_least(self, image_size=1, num_crops=1)
        _require_shares(self, "max_bad_share", "balance_power")
        require_choice(self, name=DATA_SETS)
        if self.weights and len(self.weights) != 1 + len(self.more_codes):
            raise ValueError(
                f"weights={self.weights}: must have one share for the set of the config and one "
                f"for each of config.data.more_codes={self.more_codes}"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights={self.weights}: must be positive")


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """How the image tokenizer is trained, by Adam. Errors as in ``config.validate``.

    docs/tokenizer.md has the formulas of the losses, and says how to choose their weights.
    """

    init_from: str = ""  # a trained tokenizer to begin from: its folder or a workdir; '' is none
    # Encoder and codebook stay as they are, so that a denoiser of their codes fits the new decoder.
    decoder_only: bool = False
    num_steps: int = 1000  # of a linear warm-up and a cosine
    batch_size: int = 8
    learning_rate: float = 2e-3  # the peak
    warmup_steps: int = 50
    final_learning_rate: float = 0.0  # share of the peak at the end of the cosine
    adam_b1: float = 0.9
    adam_b2: float = 0.99
    clip_norm: float = 1.0
    ema_decay: float = 0.0  # of averaged weights, which are then the result; 0 averages none
    # Share s of squared error in the reconstruction loss (1 - s) mean|d| + s mean d^2, where d is
    # the error of a pixel value in [-1, 1].
    squared_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual: str = "squeezenet"  # the network that sees: one of PERCEPTUAL
    perceptual_path: str = ""  # torchvision's file of weights, for vgg16
    adversarial_weight: float = 0.0
    adaptive_weight: bool = False  # times the published ratio of gradients
    adversarial_start: int = 0  # steps before the discriminator learns and counts
    adversarial_warmup: int = 0  # steps from there until it counts in full
    discriminator: str = "blurpool"  # one of models/discriminator.py
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    discriminator_learning_rate: float = 2e-4  # the peak, at adversarial_start or later
    lecam_weight: float = 0.0  # of the regularisation that holds a discriminator back
    lecam_decay: float = 0.999
    commitment: float = 0.25  # weight of the commitment term
    codebook_decay: float = 0.95  # of the moving average that the codebook is
    revival_threshold: float = 0.3  # a code used less than this share of the mean is seeded anew
    # Of a Gumbel quantiser: the weight of its KL term, and the steps in which the temperature falls
    # from 1 to 1/16.
    kl_weight: float = 5e-4
    temperature_steps: int = 100_000
    dtype: str = "float32"  # of the computation; or bfloat16
    remat: str = "none"  # or full: the backward pass computes every block again
    gradient_accumulation: int = 1  # parts of a batch, computed one after the other
    steps_per_call: int = 1  # steps in one program
    profile_steps: int = 0  # steps of every start that are traced to WORKDIR/autoencoder/profile

    def __post_init__(self):
        require_at_least(
            self, num_steps=1, batch_size=1, commitment=0, perceptual_weight=0,
            adversarial_weight=0, adversarial_start=0, adversarial_warmup=0, lecam_weight=0,
            kl_weight=0, temperature_steps=1, gradient_accumulation=1, steps_per_call=1,
            profile_steps=0,
        )  # fmt: skip
        _require_positive(self, "learning_rate", "discriminator_learning_rate", "clip_norm")
        if self.decoder_only and not self.init_from:
            raise ValueError("decoder_only=True: name the trained tokenizer with init_from")
        if not 0 <= self.warmup_steps < self.num_steps:
            under = f"must be at least 0 and under num_steps={self.num_steps}"
            raise ValueError(f"warmup_steps={self.warmup_steps}: {under}")
        _require_decays(
            self, "codebook_decay", "revival_threshold", "ema_decay", "lecam_decay", "adam_b1",
            "adam_b2",
        )  # fmt: skip
        _require_shares(self, "squared_weight", "final_learning_rate")
        require_choice(
            self,
            perceptual=PERCEPTUAL,
            dtype=("float32", "bfloat16"),
            remat=("none", "full"),
        )
        if (self.perceptual == "vgg16") != bool(self.perceptual_path) and self.perceptual_weight:
            raise ValueError(
                f"perceptual_path={self.perceptual_path!r}: must be torchvision's vgg16-*.pth if "
                f"perceptual is vgg16, and empty if not; perceptual is {self.perceptual!r}"
            )
        self.discriminator_config()

    def discriminator_config(self) -> DiscriminatorConfig:
        """Sizes of the discriminator."""
        try:
            return DiscriminatorConfig(
                self.discriminator,
                self.discriminator_channels,
                self.discriminator_layers,
                norm_groups=min(16, self.discriminator_channels),
                dtype=self.dtype,
            )
        except ValueError as error:
            field = "" if str(error).startswith("kind") else "discriminator_"
            text = str(error).replace("kind=", "discriminator=").replace("num_layers", "layers")
            raise ValueError(f"{field}{text}") from error

    def perceptual_config(self) -> PerceptualConfig:
        """The network of the perceptual distance."""
        network = "vgg16" if self.perceptual == "vgg16" else "squeezenet"
        return PerceptualConfig(network, self.dtype)


@dataclasses.dataclass(frozen=True)
class DiffusionOptions:
    """The noise. Errors as in ``config.validate``."""

    schedule: str = "released"  # one of SCHEDULES
    num_steps: int = 100  # T
    # Probabilities at times 1 and T that a token was kept, and that it is masked; () takes those of
    # the schedule.
    keep: tuple[float, ...] = ()
    mask: tuple[float, ...] = ()

    def __post_init__(self):
        require_at_least(self, num_steps=1)
        require_choice(self, schedule=SCHEDULES)
        for name in ("keep", "mask"):
            points = getattr(self, name)
            if points and (len(points) != 2 or self.schedule == "cosine"):
                raise ValueError(
                    f"{name}={points}: must be two probabilities, at times 1 and T, or () for "
                    "those of the schedule; a cosine schedule has no others"
                )


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How the denoiser is trained. Errors as in ``config.validate``."""

    init_from: str = ""  # trained weights to begin from (fine-tuning); '' begins anew
    # Rank of low-rank adapters of the kernels whose paths this pattern finds. They alone learn,
    # beside the weights of init_from; 0 trains all parameters.
    adapter_rank: int = 0
    adapter_paths: str = "denoiser"
    num_steps: int = 1000
    batch_size: int = 32
    optimizer: str = "adamw"  # one of OPTIMIZERS; see training/optimizer.py
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
    # Features that pictures of held-out captions are measured in at eval_every, one of FEATURES; ''
    # draws none. The number of pictures.
    evaluate_with: str = ""
    evaluate_pictures: int = 128
    best_metric: str = ""  # WORKDIR/best is the best model by it, of BEST_METRICS; '' keeps none

    def __post_init__(self):
        require_at_least(
            self, evaluate_pictures=10, num_steps=1, batch_size=1, warmup_steps=0, log_every=1,
            eval_every=1, save_every=1, keep_checkpoints=1, gradient_accumulation=1,
            steps_per_call=1, profile_steps=0, auxiliary_weight=0, weight_decay=0, adapter_rank=0,
        )  # fmt: skip
        require_choice(self, optimizer=OPTIMIZERS)
        if self.adapter_rank and self.optimizer != "adamw":
            raise ValueError(f"optimizer={self.optimizer!r}: adapters learn by 'adamw' alone")
        if self.adapter_rank and not self.init_from:
            raise ValueError("adapter_rank: adapters need a trained model: name it with init_from")
        try:
            re.compile(self.adapter_paths)
        except re.error as error:
            raise ValueError(
                f"adapter_paths={self.adapter_paths!r}: no pattern: {error}"
            ) from error
        _require_positive(self, "learning_rate", "clip_norm")
        _require_shares(self, "null_text_rate", "final_learning_rate")
        _require_decays(self, "ema_decay", "adam_b1", "adam_b2")
        if self.evaluate_with:
            require_choice(self, evaluate_with=FEATURES[:-1])
        if self.best_metric:
            require_choice(self, best_metric=BEST_METRICS)
            if self.best_metric != "validation/bits_per_token" and not self.evaluate_with:
                raise ValueError(f"best_metric={self.best_metric!r}: needs evaluate_with")


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
    """How models and pictures are measured. Errors as in ``config.validate``."""

    num_images: int = 176  # whose likelihood is bounded, from each split
    num_draws: int = 10  # draws of noise for each of them
    protocol: str = ""  # what is compared with what, by name; '' goes by the data set
    num_generated: int = 0  # pictures to measure; 0 is the protocol's number
    metrics: tuple[str, ...] = METRICS  # distances between generated and real pictures
    features: str = "efficientnet"  # one of FEATURES
    features_side: int = 0  # pixels that these networks see; 0 is the network's own
    features_path: str = ""  # the file of weights; '' is that of the network's package
    # Further features, from files of the user's: Inception of FID (pytorch-fid's or torch-
    # fidelity's file), with the beginning of its sha256 and its resize; a converted CLIP.
    inception: str = ""
    inception_sha256: str = "6726825d"
    inception_resize: str = "tensorflow"  # or "pytorch", as pytorch-fid
    # Statistics of the real pictures in Inception's features, in place of those computed: the .npz
    # of pytorch-fid, clean-fid or ADM.
    inception_statistics: str = ""
    clip: str = ""  # a model folder
    cache: str = ""  # folder of features; '' is in the output

    def __post_init__(self):
        require_at_least(self, num_images=2, num_draws=2, num_generated=0, features_side=0)
        require_choice(self, features=FEATURES, inception_resize=("tensorflow", "pytorch"))
        if unknown := [metric for metric in self.metrics if metric not in METRICS]:
            raise ValueError(f"metrics={unknown[0]!r}: must be among {', '.join(METRICS)}")
        if self.inception_statistics and not self.inception:
            raise ValueError("inception_statistics: they need the network, inception=FILE")


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How pictures are drawn unless a request says otherwise. Errors as in ``config.validate``."""

    prompts: tuple[str, ...] = ("red heart", "grinning face", "a black cat", "")
    images_per_prompt: int = 4
    num_steps: int = 0  # network calls; 0 is T
    rule: str = "ordinary"  # what a step does; one of RULES in diffusion/choices.py
    guidance_scale: float = 3.0
    truncation: float = 0.9  # 1 keeps every code

    def __post_init__(self):
        require_at_least(self, images_per_prompt=1, num_steps=0, guidance_scale=0)
        _require_positive(self, "truncation")
        require_choice(self, rule=choices.RULES)
        if not self.prompts or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("prompts: give at least one text; an empty one will do")


@dataclasses.dataclass(frozen=True)
class DistilOptions:
    """What a student of few steps learns from. Errors as in ``config.validate``."""

    num_steps: int = 4  # network calls of the student
    num_pairs: int = 20_000  # pictures that the teacher draws
    # A file of texts or labels to draw; '' takes the captions of the data set.
    prompts_path: str = ""
    # Of the teacher's judgement on what the student draws (training/moments.py), beside the pairs.
    moment_weight: float = 0.0

    def __post_init__(self):
        require_at_least(self, num_steps=1, num_pairs=1, moment_weight=0)


OPTIONS = {
    "data": DataOptions,
    "diffusion": DiffusionOptions,
    "training": TrainingOptions,
    "mesh": MeshOptions,
    "evaluation": EvaluationOptions,
    "sampling": SamplingOptions,
    "distil": DistilOptions,
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
