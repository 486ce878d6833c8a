"""Pictures from a text, a class or nothing: tokenizer, text encoder, sampler, denoiser and
autoencoder in one object.

Letters: P prompts, J images of each prompt, B batch, N image tokens, L text tokens, D text width,
K codes, S image side, F sampling steps.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data import masks
from vqd_jax.data.images import Picture, square
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import choices, sampler
from vqd_jax.diffusion.choices import RULES  # noqa: F401
from vqd_jax.errors import UserError
from vqd_jax.interop import folder, pretrained
from vqd_jax.models import autoencoder, conditioned
from vqd_jax.models.attention import ONE_DEVICE, Placement
from vqd_jax.parallel import rows, sharding

# Layouts of other programs that a model can be written in.
WRITERS = ("diffusers", "published")
# Settings that the config decides where a request does not.
_OF_CONFIG = ("num_steps", "rule", "guidance_scale", "truncation")


class Generation(NamedTuple):
    """What ``VQDiffusion.generate`` returns.

    Attributes:
      images: P * J pictures; those of the first prompt come first.
      pixels: the same pictures, uint8 [P, J, S, S, 3].
      codes: int32 [P, J, N].
      trajectory: int32 [F, P, J, N], the tokens after every step (K is the mask token), if asked
        for.
      predictions: int32 [F, P, J, N], the likeliest clean codes at every step, likewise.
    """

    images: list[Image.Image]
    pixels: np.ndarray
    codes: np.ndarray
    trajectory: np.ndarray | None
    predictions: np.ndarray | None


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
        self._schedule = schedule = config_lib.noise_schedule(config)
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
        return cls(*pretrained.load_run(workdir))

    @classmethod
    def from_pretrained(cls, directory: str) -> "VQDiffusion":
        """The model in a folder that ``save_pretrained`` or ``--mode=convert`` wrote.

        A workdir of a training run will do as well.

        Raises:
          UserError: there is no model, or it is damaged or of another kind.
        """
        return cls(*pretrained.load_model(directory))

    def save_pretrained(
        self, directory: str, *, format: str = "vqd_jax", dtype: str = "float32"
    ) -> None:
        """Writes the model. The target appears whole or not at all.

        Args:
          directory: the target; a file where ``format`` is "published".
          format: "vqd_jax", a folder for ``from_pretrained``; "diffusers", a folder for
            ``diffusers.VQDiffusionPipeline``; or "published", a .pth file in the layout of the
            released checkpoints.
          dtype: how a vqd_jax folder stores floats, "float32" or "bfloat16".

        Raises:
          UserError: the format has no place for this kind of model.
          OSError: it cannot be written.
        """
        params = {**self._params, "autoencoder": self._autoencoder_params}
        params = jax.tree.map(np.asarray, params)
        if format == "vqd_jax":
            described = {"kind": config_lib.MODEL_KIND, **self.config.to_dict()}
            texts = self.tokenizer.files("tokenizer")
            folder.save(directory, described, params, dtype=dtype, files=texts)
            return
        _require(format in WRITERS, f"format={format!r}: vqd_jax, {' or '.join(WRITERS)}")
        writer = importlib.import_module(f"vqd_jax.interop.{format}")
        writer.write(directory, self.config, params, self.tokenizer)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that decides the pictures that a request gets."""
        decisive = {
            "params": self._params,
            "autoencoder": self._autoencoder_params,
            "sizes": [str(self._sizes), str(config_lib.autoencoder_config(self.config))],
            "noise": dataclasses.asdict(self._schedule),
            "tokenizer": self.tokenizer.files("tokenizer"),
        }
        return files.fingerprint(decisive)

    def with_params(self, params: Any) -> "VQDiffusion":
        """The same model with other parameters; compiled functions are shared."""
        other = object.__new__(VQDiffusion)
        other.__dict__.update(self.__dict__, _params=params)
        return other

    def on_mesh(self, mesh: Mesh) -> "VQDiffusion":
        """The same model on several devices.

        ``parallel.sharding.RULES`` divide the parameters; ``data`` and ``fsdp`` share the images of
        a batch. Images do not depend on the mesh.
        """
        params = jax.device_put(self._params, sharding.shardings(self._params, mesh))
        codec = jax.device_put(self._autoencoder_params, sharding.replicated(mesh))
        return VQDiffusion(self.config, params, codec, self.tokenizer, mesh)

    def settings(self, **options: Any) -> sampler.Settings:
        """How to sample: what the config says, changed by these options.

        Args:
          **options: of ``diffusion.choices.settings``; None takes the config's or the default.

        Raises:
          UserError: a value is impossible for this model.
        """
        options = {name: value for name, value in options.items() if value is not None}
        chosen = {name: self.config.sampling[name] for name in _OF_CONFIG} | options
        if not options.keys().isdisjoint(("times", "published_fast")):
            chosen["num_steps"] = options.get("num_steps", 0)
        if self._kind == "none":
            alone = options.get("guidance_scale", 1) == 1
            _require(alone, "guidance_scale: an unconditional model has nothing to be guided to")
            chosen["guidance_scale"] = 1
        try:
            return choices.settings(self._schedule, self._sizes.denoiser.grid, **chosen)
        except ValueError as error:
            raise UserError(str(error)) from error

    def generate(
        self,
        prompts: Sequence[str] | Sequence[int] | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        negative_prompt: str | int | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> Generation:
        """Pictures of every prompt; image j of prompt i depends on (seed, i, j) and the prompt.

        Args:
          prompts: P texts, or one; an empty text is unconditional, and a long one is cut with a
            warning. For a class-conditional model P labels, as numbers or texts; an empty text is
            no class. For an unconditional model None.
          num_images: J.
          seed: 0..2**32-1.
          negative_prompt: a text or label that guidance leads away from; None is the empty one.
          batch_size: largest number of images in one call of the network.
          **options: of ``settings``, such as ``num_steps``, ``guidance_scale``, ``truncation``,
            ``rule`` and ``trajectory``.

        Raises:
          UserError: the model cannot meet the request; the message names the argument.
        """
        _require(num_images >= 1, f"num_images={num_images}: must be at least 1")
        if prompts is None and self._kind == "none":
            prompts = [""]
        if isinstance(prompts, str | int | np.integer):
            prompts = [prompts]
        _require(prompts is not None and len(prompts) > 0, "generate needs at least one prompt")
        pairs = [(i, j) for i in range(len(prompts)) for j in range(num_images)]
        made = self._draw(
            [prompts[i] for i, _ in pairs], pairs, self.settings(**options),
            seed=seed, negative_prompt=negative_prompt, batch_size=batch_size,
        )  # fmt: skip
        pixels = self.decode_codes(made.codes)
        shape = (len(prompts), num_images)
        seen = [x if x is None else x.reshape(len(x), *shape, -1) for x in made[1:]]
        return Generation(
            [Image.fromarray(p) for p in pixels],
            pixels.reshape(*shape, *pixels.shape[1:]),
            made.codes.reshape(*shape, -1),
            *seen,
        )

    def inpaint(
        self,
        image: Picture,
        mask: Picture,
        prompt: str | int | None = None,
        *,
        strength: float | None = None,
        **options: Any,
    ) -> Generation:
        """Pictures whose masked part is made anew; the codes of the rest never change.

        Args:
          image: picture or uint8 [H, W, 3]; cut to a square and resized as in evaluation.
          mask: of the same height and width; it is painted where the mask is True, or above half
            of its range. A code is made anew if any of its pixels is painted.
          prompt: text, label or None, as ``generate`` takes them; P is 1.
          strength: what is painted begins from ``image``, noised as by ``edit``; None begins from
            nothing.
          **options: of ``generate``.
        """
        codes = self.encode_images([image])[0]
        painted = masks.of_tokens(mask, image, self._sizes.denoiser.grid)
        _require(painted.any(), "the mask is empty: nothing is to be painted")
        options["known"] = np.where(painted, self._num_codes, codes).astype(np.int32)
        if strength is not None:
            options |= {"initial": codes, "strength": strength}
        return self.generate(None if prompt is None else [prompt], **options)

    def edit(
        self,
        image: Picture,
        prompt: str | int | None = None,
        *,
        strength: float = 0.5,
        **options: Any,
    ) -> Generation:
        """Pictures that begin from a given one with noise on it: image to image.

        Args:
          image: picture or uint8 [H, W, 3]; cut to a square and resized as in evaluation.
          prompt: text, label or None, as ``generate`` takes them; P is 1.
          strength: share of the noise, above 0 and up to 1; at 1 nothing of ``image`` is left.
          **options: of ``generate``.
        """
        options |= {"initial": self.encode_images([image])[0], "strength": strength}
        return self.generate(None if prompt is None else [prompt], **options)

    def encode_text(self, texts: Sequence[str]) -> jax.Array:
        """Features float32 [B, L, D] of B texts; the empty text has the learned ones, if any."""
        _require(self._kind == "text", f"a model with condition {self._kind!r} reads no text")
        return self._encode_text(self._params, self._text_ids(texts))

    def encode_images(self, images: Sequence[Picture], batch_size: int = 32) -> np.ndarray:
        """Codes int32 [B, N] of B pictures, uint8 [H, W, 3] each.

        A Gumbel autoencoder gives the likeliest codes. Pictures of another size than S are cut to a
        square and resized.
        """
        _require(len(images), "no picture is given")
        side = self.config.data.image_size
        squares = np.stack([square(image, side) for image in images])
        return self._in_batches(self._encode, squares, batch_size)

    def decode_codes(self, codes: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Pictures uint8 [B, S, S, 3] of codes int32 [B, N] in 0..K-1."""
        codes = np.asarray(codes)
        if codes.size and (codes.min() < 0 or codes.max() >= self._num_codes):
            raise UserError(
                f"codes lie in {codes.min()}..{codes.max()}; the model knows "
                f"0..{self._num_codes - 1}"
            )
        return self._in_batches(self._decode, codes, batch_size)

    def reconstruct(self, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Pictures encoded and decoded: uint8 [B, H, W, 3] -> uint8 [B, S, S, 3]."""
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

    def sample_codes(
        self,
        prompts: Sequence[str] | Sequence[int],
        pairs: Sequence[tuple[int, int]],
        *,
        seed: int = 0,
        negative_prompt: str | int | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> np.ndarray:
        """Codes int32 [B, N] of single images out of a large ``generate``.

        Args:
          prompts: B texts or labels, one for each image.
          pairs: B pairs (i, j): the image is the j-th of the i-th prompt.
          seed, negative_prompt, batch_size, **options: of ``generate``.
        """
        settings = self.settings(**options)
        drawn = {"seed": seed, "negative_prompt": negative_prompt, "batch_size": batch_size}
        return self._draw(prompts, pairs, settings, **drawn).codes

    def _draw(
        self, prompts, pairs, settings, *, seed, negative_prompt, batch_size
    ) -> sampler.Sample:
        """NumPy arrays for R prompts and pairs (i, j)."""
        _require(0 <= seed < 2**32, f"seed={seed}: must lie in 0..2**32-1")
        _require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
        if negative_prompt is not None:
            _require(settings.guidance is not None, "negative_prompt: needs a guidance_scale")
        conditions, null = self._conditions(prompts, negative_prompt)
        shards = 1 if self._mesh is None else sharding.num_row_shards(self._mesh)
        batch_size = rows.even_size(len(pairs), batch_size, shards)
        of_all = {"known": settings.known, "initial": settings.initial}
        settings = settings.replace(
            **{n: x if x is None else np.tile(x, (batch_size, 1)) for n, x in of_all.items()}
        )
        made = []
        for (part, condition), new in rows.batches(
            (np.array(pairs, np.uint32), conditions), batch_size
        ):
            # JAX would make an int32 of a Python int, and seeds may be larger.
            keys = self._put(image_keys(np.uint32(seed), part))
            drawn = self._sample(self._params, keys, self._put(condition), null, settings)
            made.append(jax.tree.map(lambda x, new=new: np.asarray(x)[..., :new, :], drawn))
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-2), *made)

    def _in_batches(self, run: Callable, array: np.ndarray, batch_size: int) -> np.ndarray:
        def on_devices(part):
            return run(self._autoencoder_params, self._put(part))

        return rows.in_batches(on_devices, array, min(batch_size, len(array)))

    def _put(self, array):
        """An array [B, ...] with its rows spread over the devices of the mesh, if there is one."""
        if self._mesh is None:
            return array
        whole = array.shape[0] % sharding.num_row_shards(self._mesh)
        place = sharding.replicated if whole else sharding.batch_sharding
        return jax.device_put(array, place(self._mesh))

    def _conditions(self, prompts, negative) -> tuple[np.ndarray, np.ndarray]:
        """Text ids [R, L], labels [R] or, without a condition, zeros [R]; and the null's [1, ...].

        The null condition is ``negative``, or the empty one where that is None.
        """
        if self._kind == "none":
            _require(set(prompts) == {""}, "this model is unconditional: it takes no prompt")
            return np.zeros(len(prompts), np.int32), np.zeros(1, np.int32)
        texts = [*prompts, "" if negative is None else negative]
        if self._kind == "text":
            for text in texts:
                _require(isinstance(text, str), f"prompt {text!r}: must be a text")
            encoded = self._text_ids(texts)
        else:
            classes = self.config.denoiser.num_classes
            encoded = np.array([_label(text, classes) for text in texts], np.int32)
        return encoded[:-1], encoded[-1:]

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
