"""From a sentence, a class or nothing to pictures, and back: tokenizer, text encoder, sampler,
denoiser, autoencoder in one object.

Letters: P prompts, J images a prompt, B batch, N image tokens, L text tokens, D text width,
K codes, S image side, F sampling steps.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from vqd_jax import config as config_lib
from vqd_jax.data.images import Picture, square, token_mask
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import rules, sampler
from vqd_jax.errors import UserError
from vqd_jax.interop import folder
from vqd_jax.models import autoencoder, conditioned
from vqd_jax.models.attention import ONE_DEVICE, Placement
from vqd_jax.parallel import sharding

# What a step of the sampler does, by the name that configs and the command line use.
RULES: dict[str, Callable[[tuple[int, int]], Callable]] = {
    "ordinary": lambda grid: rules.Ancestral(),
    "high_quality": lambda grid: rules.HighQuality(),
    "purity": lambda grid: rules.Purity(1.0),
    "confidence": lambda grid: rules.Confidence(),
    "halton": rules.Halton,
    "remask": lambda grid: rules.Remask(),
}


# Layouts of other programs that a model can be written in.
WRITERS = ("diffusers", "published")


class Generation(NamedTuple):
    """What ``VQDiffusion.generate`` returns.

    Attributes:
      images: P times J pictures, the J of the first prompt first.
      pixels: the same as uint8 [P, J, S, S, 3].
      codes: int32 [P, J, N].
      trajectory: int32 [F, P, J, N], tokens after every step (K is the mask token), or None.
    """

    images: list[Image.Image]
    pixels: np.ndarray
    codes: np.ndarray
    trajectory: np.ndarray | None


class VQDiffusion:
    """A trained model, ready to sample.

    Args:
      config: the config it was trained with.
      params: of ``models.conditioned``, usually the averaged ones.
      autoencoder_params: of ``models.autoencoder``, codebook included.
      tokenizer: of prompts; None is CLIP's.
      mesh: devices to use, where the parameters are already (see ``on_mesh``); None is one.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Any,
        autoencoder_params: Any,
        tokenizer: ClipTokenizer | None = None,
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer or ClipTokenizer(config.text_encoder.context_length)
        self._params = params
        self._autoencoder_params = autoencoder_params
        self._mesh = mesh
        self._sizes = sizes = config_lib.model_config(config)
        codec = config_lib.autoencoder_config(config)
        schedule = config_lib.noise_schedule(config)
        place = ONE_DEVICE if mesh is None else sharding.placement(mesh)
        self._sample = _compiled(draw, model_config=sizes, schedule=schedule, placement=place)
        self._encode_text = _compiled(text_features, config=sizes, placement=place)
        self._log_x0 = _compiled(log_p0, config=sizes, placement=place)
        self._encode = _compiled(autoencoder.encode, config=codec)
        self._decode = _compiled(autoencoder.decode, config=codec)

    @classmethod
    def from_workdir(cls, workdir: str) -> "VQDiffusion":
        """The newest checkpoint of a training run, with averaged parameters.

        Raises:
          UserError: nothing was trained there, or it cannot be read.
        """
        # What only a run needs; a model folder is read without Orbax.
        from vqd_jax import checkpoint
        from vqd_jax.training import stage_one

        path = Path(workdir)
        if not (path / "config.json").exists():
            raise UserError(f"{path} has no config.json: nothing was trained there")
        config = config_lib.load(str(path / "config.json"))
        if not Path(stage_one.model_folder(workdir)).exists():
            raise UserError(f"stage one of {path} is not finished; run the training command again")
        autoencoder_params = stage_one.load(config, stage_one.model_folder(workdir))
        sharding.warn_of_slow_dtype(config, jax.devices()[0])
        abstract = conditioned.abstract_params(config_lib.model_config(config))
        # Moments of the optimizer, and what was not averaged, stay on disk.
        wanted = {"ema_params": checkpoint.abstract(abstract)}
        _, found = checkpoint.load(checkpoint.folder(config, workdir), wanted)
        return cls(config, found["ema_params"], autoencoder_params)

    @classmethod
    def from_pretrained(cls, directory: str) -> "VQDiffusion":
        """The model in a folder that ``save_pretrained`` or ``--mode=convert`` wrote.

        A workdir of a training run will do as well.

        Raises:
          UserError: there is no model, or it is damaged or of another kind.
        """
        path = Path(directory)
        if (path / "model_index.json").exists():
            raise UserError(
                f"{path} is a folder of diffusers; convert it first: "
                f"--mode=convert --source={path} --target=DIR"
            )
        if not (path / "config.json").exists():
            raise UserError(
                f"{path} is no model folder and no workdir of a run: it has no config.json"
            )
        kind = folder.load_config(path).get("kind")
        if kind is None:
            return cls.from_workdir(directory)
        if kind != config_lib.MODEL_KIND:
            raise UserError(
                f"{path} holds a model of kind {kind!r}; pictures need a whole one: denoiser and "
                "autoencoder"
            )
        config = config_lib.load(str(path / "config.json"))
        sharding.warn_of_slow_dtype(config, jax.devices()[0])
        abstract = conditioned.abstract_params(config_lib.model_config(config))
        codec = autoencoder.abstract_params(config_lib.autoencoder_config(config))
        abstract = {**abstract, "autoencoder": codec}
        params = folder.load_params(path, abstract, place=jax.device_put)
        codec = params.pop("autoencoder")
        tokenizer = None
        if (path / "tokenizer").is_dir():
            length = config.text_encoder.context_length
            tokenizer = ClipTokenizer.from_folder(path / "tokenizer", length)
        return cls(config, params, codec, tokenizer)

    def save_pretrained(
        self, directory: str, *, format: str = "vqd_jax", dtype: str = "float32"
    ) -> None:
        """Writes the model; the target appears complete or not at all.

        Args:
          directory: the target; a file where ``format`` is "published".
          format: "vqd_jax", a folder for ``from_pretrained``; "diffusers", a folder for
            ``diffusers.VQDiffusionPipeline``; or "published", a .pth file in the layout of the
            released checkpoints.
          dtype: in which a vqd_jax folder stores floats, "float32" or "bfloat16".

        Raises:
          UserError: the format has no place for this kind of model.
          OSError: it cannot be written.
        """
        params = {**self._params, "autoencoder": self._autoencoder_params}
        params = jax.tree.map(np.asarray, params)
        if format == "vqd_jax":
            described = {"kind": config_lib.MODEL_KIND, **self.config.to_dict()}
            files = self.tokenizer.files("tokenizer")
            folder.save(directory, described, params, dtype=dtype, files=files)
            return
        _require(format in WRITERS, f"format={format!r}: vqd_jax, {' or '.join(WRITERS)}")
        writer = importlib.import_module(f"vqd_jax.interop.{format}")
        writer.write(directory, self.config, params, self.tokenizer)

    def with_params(self, params: Any) -> "VQDiffusion":
        """The same model with other parameters; compiled functions are shared."""
        other = object.__new__(VQDiffusion)
        other.__dict__.update(self.__dict__, _params=params)
        return other

    def on_mesh(self, mesh: Mesh) -> "VQDiffusion":
        """The same model on several devices: parameters divided by ``parallel.sharding.RULES``, the
        images of a batch spread over ``data`` and ``fsdp``. Images do not depend on the mesh."""
        params = jax.device_put(self._params, sharding.shardings(self._params, mesh))
        codec = jax.device_put(self._autoencoder_params, sharding.replicated(mesh))
        return VQDiffusion(self.config, params, codec, self.tokenizer, mesh)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[int] | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        truncation: float | None = None,
        rule: str | Callable | None = None,
        trajectory: bool = False,
        batch_size: int = 16,
    ) -> Generation:
        """Pictures of every prompt; image j of prompt i depends on (seed, i, j) and the prompt.

        Args:
          prompts: P texts (or one), an empty one is unconditional and too long ones are cut with a
            warning; or P class labels of a class-conditional model, as numbers or texts, where an
            empty text is no class; or None for an unconditional model.
          num_images: J.
          seed: 0..2**32-1.
          num_steps: network calls, 1..T, or 0 for T; None takes the config's.
          guidance_scale: 1 is no guidance; None takes the config's.
          truncation: share of probability that is kept, 1 is all; None takes the config's.
          rule: what a step does: a name in ``RULES`` or a callable of ``diffusion.rules``; None
            takes the config's.
          trajectory: return the tokens after every step too.
          batch_size: images in one call of the network.
        """
        return self._generate(
            prompts,
            {},
            num_images=num_images,
            seed=seed,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            truncation=truncation,
            rule=rule,
            trajectory=trajectory,
            batch_size=batch_size,
        )

    def inpaint(
        self, image: Picture, mask: Picture, prompt: str | int | None = None, **options: Any
    ) -> Generation:
        """Pictures whose masked part is made anew; the codes of the rest never change.

        Args:
          image: picture or uint8 [H, W, 3]; cut to a square and resized as in evaluation.
          mask: of the same height and width: above half its range (or True) where to paint. A code
            is made anew if any of its pixels is.
          prompt: text, label or None, as ``generate`` takes them; P is 1.
          **options: of ``generate``.
        """
        codes = self.encode_images([image])[0]
        painted = token_mask(mask, image, self._sizes.denoiser.grid)
        tokens = np.where(painted, self._num_codes, codes).astype(np.int32)
        _require((tokens == self._num_codes).any(), "the mask is empty: nothing is to be painted")
        return self._generate(None if prompt is None else [prompt], {"known": tokens}, **options)

    def edit(
        self,
        image: Picture,
        prompt: str | int | None = None,
        *,
        strength: float = 0.5,
        **options: Any,
    ) -> Generation:
        """Pictures that begin from a given one, noised: image to image.

        Args:
          image: picture or uint8 [H, W, 3]; cut to a square and resized as in evaluation.
          prompt: text, label or None, as ``generate`` takes them; P is 1.
          strength: share of the noise, above 0 and up to 1, where nothing of ``image`` is left.
          **options: of ``generate``.
        """
        _require(0 < strength <= 1, f"strength={strength}: must lie above 0 and up to 1")
        codes = self.encode_images([image])[0]
        start = {"initial": codes, "strength": jnp.float32(strength)}
        return self._generate(None if prompt is None else [prompt], start, **options)

    def encode_text(self, texts: Sequence[str]) -> jax.Array:
        """Features float32 [B, L, D] of B texts; of the empty one the learned null, if any."""
        _require(self._kind == "text", f"a model with condition {self._kind!r} reads no text")
        return self._encode_text(self._params, self._text_ids(texts))

    def encode_images(self, images: Sequence[Picture], batch_size: int = 32) -> np.ndarray:
        """Codes int32 [B, N] of B pictures, uint8 [H, W, 3] each; the likeliest of a Gumbel codec.

        Pictures of another size than S are cut to a square and resized.
        """
        _require(len(images), "no picture is given")
        side = self.config.data.image_size
        images = np.stack([square(image, side) for image in images])
        run = lambda rows: self._encode(self._autoencoder_params, self._put(rows))  # noqa: E731
        return _in_batches(run, images, batch_size)

    def decode_codes(self, codes: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Pictures uint8 [B, S, S, 3] of codes int32 [B, N] in 0..K-1."""
        codes = np.asarray(codes)
        if codes.size and (codes.min() < 0 or codes.max() >= self._num_codes):
            raise UserError(
                f"codes lie in {codes.min()}..{codes.max()}; the model knows "
                f"0..{self._num_codes - 1}"
            )
        run = lambda rows: self._decode(self._autoencoder_params, self._put(rows))  # noqa: E731
        return _in_batches(run, codes, batch_size)

    def reconstruct(self, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Pictures through their codes and back: uint8 [B, H, W, 3] -> uint8 [B, S, S, 3]."""
        return self.decode_codes(self.encode_images(images, batch_size), batch_size)

    def predict_log_x0(
        self, codes: np.ndarray, condition: np.ndarray | None, time: np.ndarray
    ) -> jax.Array:
        """log p0 of the network, float32 [B, N, K], normalised.

        Args:
          codes: int32 [B, N] in 0..K, where K is the mask token.
          condition: text features [B, L, D] (``encode_text``), labels int32 [B], or None.
          time: int32 [B] in 1..T.
        """
        return self._log_x0(self._params, jnp.asarray(codes), condition, jnp.asarray(time))

    @property
    def _kind(self) -> str:
        return self.config.denoiser.condition

    @property
    def _num_codes(self) -> int:
        return self._sizes.denoiser.num_codes

    def _settings(
        self, num_steps=None, guidance_scale=None, truncation=None, rule=None, trajectory=False
    ):
        defaults = self.config.sampling
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        if self._kind == "none":
            _require(
                guidance_scale in (None, 1), "an unconditional model has nothing to be guided to"
            )
            scale = 1
        rate = defaults.truncation if truncation is None else truncation
        steps = defaults.num_steps if num_steps is None else num_steps
        rule = defaults.rule if rule is None else rule
        total = self.config.diffusion.num_steps
        _require(0 <= steps <= total, f"num_steps={steps}: must lie in 0..{total}; 0 is {total}")
        _require(0 <= scale < math.inf, f"guidance_scale={scale}: must be finite, at least 0")
        _require(rate > 0, f"truncation={rate}: must be positive")
        _require(
            callable(rule) or rule in RULES, f"rule={rule!r}: must be one of {', '.join(RULES)}"
        )
        return sampler.Settings(
            num_steps=steps,
            rule=rule if callable(rule) else RULES[rule](self._sizes.denoiser.grid),
            guidance=None if scale == 1 else jnp.float32(scale),
            truncation=None if rate >= 1 else jnp.float32(rate),
            trajectory=trajectory,
        )

    def _generate(self, prompts, start, *, num_images=1, **options) -> Generation:
        """``start``: settings of what to begin from; codes int32 [N] are for every image."""
        _require(num_images >= 1, f"num_images={num_images}: must be at least 1")
        if prompts is None and self._kind == "none":
            prompts = [""]
        if isinstance(prompts, str | int | np.integer):
            prompts = [prompts]
        _require(prompts is not None and len(prompts) > 0, "generate needs at least one prompt")
        pairs = [(i, j) for i in range(len(prompts)) for j in range(num_images)]
        codes, trajectory = self._draw([prompts[i] for i, _ in pairs], pairs, start, **options)
        pixels = self.decode_codes(codes)
        shape = (len(prompts), num_images)
        if trajectory is not None:
            trajectory = trajectory.reshape(trajectory.shape[0], *shape, -1)
        return Generation(
            [Image.fromarray(p) for p in pixels],
            pixels.reshape(*shape, *pixels.shape[1:]),
            codes.reshape(*shape, -1),
            trajectory,
        )

    def sample_codes(
        self, prompts: Sequence[str] | Sequence[int], pairs: Sequence[tuple[int, int]], **options
    ) -> np.ndarray:
        """Codes int32 [B, N] of single images out of a large ``generate``.

        Args:
          prompts: B texts or labels, one an image.
          pairs: B times (i, j): the image is the j-th of the i-th prompt.
          **options: of ``generate``, but for ``num_images`` and ``trajectory``.
        """
        return self._draw(prompts, pairs, {}, **options)[0]

    def _draw(self, prompts, pairs, start, *, seed=0, batch_size=16, **options):
        """Codes [R, N] and, if asked for, tokens [F, R, N] of R prompts and (i, j)."""
        _require(0 <= seed < 2**32, f"seed={seed}: must lie in 0..2**32-1")
        settings = self._settings(**options)
        conditions, null = self._conditions(prompts)
        keys = image_keys(seed, np.array(pairs, np.uint32))
        # Batches of about equal size: 20 images are two tens, not sixteen and four; and a whole
        # number of rows on every device.
        shards = 1 if self._mesh is None else sharding.num_row_shards(self._mesh)
        batch_size = math.ceil(len(pairs) / math.ceil(len(pairs) / batch_size))
        batch_size = shards * math.ceil(batch_size / shards)
        of_all = lambda x: jnp.tile(x, (batch_size, 1)) if x.ndim else x  # noqa: E731
        settings = settings.replace(**jax.tree.map(of_all, start))
        codes, tokens = [], []
        for first in range(0, len(pairs), batch_size):
            new = min(batch_size, len(pairs) - first)
            # The last batch is filled up with its last image, so that there is one shape.
            rows = np.minimum(np.arange(first, first + batch_size), len(pairs) - 1)
            sample = self._sample(
                self._params, self._put(keys[rows]), self._put(conditions[rows]), null, settings
            )
            codes.append(np.asarray(sample.codes)[:new])
            if settings.trajectory:
                tokens.append(np.asarray(sample.trajectory)[:, :new])
        return np.concatenate(codes), np.concatenate(tokens, axis=1) if tokens else None

    def _put(self, rows):
        """Rows [B, ...] spread over the devices of the mesh, if there is one."""
        if self._mesh is None:
            return rows
        whole = rows.shape[0] % sharding.num_row_shards(self._mesh)
        place = sharding.replicated if whole else sharding.batch_sharding
        return jax.device_put(rows, place(self._mesh))

    def _conditions(self, prompts) -> tuple[np.ndarray, np.ndarray]:
        """Text ids [P, L], labels [P] or, without a condition, zeros [P]; and the null's."""
        if self._kind == "none":
            _require(set(prompts) == {""}, "this model is unconditional: it takes no prompt")
            return np.zeros(len(prompts), np.int32), np.zeros(1, np.int32)
        if self._kind == "text":
            for prompt in prompts:
                _require(isinstance(prompt, str), f"prompt {prompt!r}: must be a text")
            return self._text_ids(prompts), self._text_ids([""])
        classes = self.config.denoiser.num_classes
        labels = [_label(prompt, classes) for prompt in prompts]
        return np.array(labels, np.int32), np.array([classes], np.int32)

    def _text_ids(self, texts: Sequence[str]) -> np.ndarray:
        size = self.config.text_encoder.vocab_size
        _require(
            self.tokenizer.vocab_size == size,
            f"the tokenizer has {self.tokenizer.vocab_size} ids and the text encoder {size}: "
            "the model folder lacks the tokenizer that belongs to it",
        )
        return self.tokenizer.encode_batch(list(texts))


@jax.jit
def image_keys(seed, pairs):
    """PRNG keys [B], each a function of the seed and one of the pairs (i, j), uint32 [B, 2]."""
    root = jax.random.fold_in(jax.random.key(seed), 2)

    def fold(pair):
        return jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1])

    return jax.vmap(fold)(pairs)


def draw(
    params,
    keys,
    condition,
    null,
    settings,
    *,
    model_config,
    schedule,
    placement: Placement = ONE_DEVICE,
):
    """A ``sampler.Sample`` of one image for each key [B].

    Conditions are [B, ...]; the null condition of guidance is [1, ...].
    """
    model = conditioned.bind(model_config, params, placement=placement)
    batch, grid = keys.shape[0], model_config.denoiser.grid
    if settings.guidance is not None:
        condition = sampler.pairs(condition, jnp.broadcast_to(null, condition.shape))
    # What does not depend on the tokens is computed once, before the scan over steps.
    context = model.context(condition)
    modulations = model.denoiser.modulations(jnp.arange(1, schedule.num_steps + 1))

    def predict_log_x0(tokens, time):
        # With a list of scales, some steps ask for the conditional rows alone.
        part = context
        if context is not None and tokens.shape[0] < condition.shape[0]:
            part = jax.tree.map(lambda x: x[:, ::2], context)
        return model.denoiser.denoise(tokens, modulations[:, time - 1], part)

    return sampler.sample(keys, predict_log_x0, (batch, grid[0] * grid[1]), schedule, settings)


def text_features(params, ids, *, config, placement: Placement = ONE_DEVICE):
    """Features float32 [B, L, D] of ids int32 [B, L]."""
    model = conditioned.bind(config, params, placement=placement)
    return model.text_features(ids).astype(jnp.float32)


def log_p0(params, codes, condition, time, *, config, placement: Placement = ONE_DEVICE):
    """log p0 float32 [B, N, K] of tokens [B, N] at times [B]; features, labels or no condition."""
    denoiser = conditioned.bind(config, params, placement=placement).denoiser
    return jax.nn.log_softmax(denoiser(codes, time, condition))


def _compiled(function: Callable, **static: Any) -> Callable:
    return jax.jit(functools.partial(function, **static))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _label(prompt: str | int, classes: int) -> int:
    """The class that a prompt names by its number; the empty one is no class."""
    if isinstance(prompt, str):
        prompt = classes if not prompt.strip() else int(prompt) if prompt.isdigit() else -1
    _require(
        isinstance(prompt, int | np.integer) and 0 <= prompt <= classes,
        f"class label {prompt!r}: must be a whole number in 0..{classes - 1}; {classes} is none",
    )
    return int(prompt)


def _in_batches(run: Callable, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """``run`` over all rows, in batches of one shape."""
    size = min(batch_size, len(rows))
    made = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        padded = np.concatenate([part, part[:1].repeat(size - len(part), axis=0)])
        made.append(np.asarray(run(padded))[: len(part)])
    return np.concatenate(made)
