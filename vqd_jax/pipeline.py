"""Pictures from a text, a class or nothing: tokenizer, text encoder, sampler, denoiser and
autoencoder in one object.

Letters: P prompts, J images of each prompt, B batch, N image tokens, L text tokens, D text width,
K codes, S image side, F sampling steps.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from vqd_jax import config as config_lib
from vqd_jax import files, request
from vqd_jax.compiled import Networks
from vqd_jax.data import masks
from vqd_jax.data.images import Picture, square
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import choices, sampler
from vqd_jax.diffusion.choices import RULES  # noqa: F401
from vqd_jax.errors import UserError
from vqd_jax.generation import Callback, Generation, Likelihood
from vqd_jax.interop import folder, pretrained
from vqd_jax.models import autoencoder
from vqd_jax.parallel import processes, sharding
from vqd_jax.request import require

# Layouts of other programs that a model can be written in.
WRITERS = ("diffusers", "published")
# Settings that the config decides where a request does not.
_OF_CONFIG = ("num_steps", "rule", "guidance_scale", "truncation")
# What ``generate`` takes; ``inpaint``, ``repaint`` and ``edit`` hand it on.
_OF_GENERATE = (
    "num_images", "seed", "negative_prompt", "batch_size", "callback", "callback_steps",
    *request.OPTIONS,
)  # fmt: skip


class VQDiffusion:
    """A trained model, ready to sample.

    Args:
      config: the config it was trained with.
      params: of ``models.conditioned``, usually the averaged ones.
      autoencoder_params: of ``models.autoencoder``, codebook included.
      tokenizer: of prompts; None is CLIP's.
      mesh: devices to use, where the parameters are already (see ``on_mesh``); None is one.
      autoencoder_dtype: that pictures are decoded in, "float32" or "bfloat16". Pictures are encoded
        in float32.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Any,
        autoencoder_params: Any,
        tokenizer: ClipTokenizer | None = None,
        mesh: Mesh | None = None,
        autoencoder_dtype: str = "float32",
    ):
        self.config = config
        self.tokenizer = tokenizer or ClipTokenizer(config.text_encoder.context_length)
        self._conditions = request.Conditions(config, self.tokenizer)
        self._networks = Networks(config, params, autoencoder_params, mesh, autoencoder_dtype)
        self._autoencoder_dtype = autoencoder_dtype

    @classmethod
    def from_workdir(cls, workdir: str) -> "VQDiffusion":
        """The newest checkpoint of a training run, with averaged parameters.

        Raises:
          UserError: nothing was trained there, or it cannot be read.
        """
        return cls(*pretrained.load_run(workdir))

    @classmethod
    @request.known_words()
    def from_pretrained(
        cls,
        directory: str,
        *,
        dtype: str | None = None,
        autoencoder_dtype: str = "float32",
        mesh: Mesh | None = None,
    ) -> "VQDiffusion":
        """The model in a folder that ``save_pretrained`` or ``--mode=convert`` wrote.

        A workdir of a training run will do as well.

        Args:
          directory: the folder, or "emoji": the model that comes with this package.
          dtype: "float32" or "bfloat16": what the text encoder and the denoiser compute and keep
            their parameters in; "float32" rounds no product, either. None is what the config says.
          autoencoder_dtype: likewise, of the decoder.
          mesh: devices that share the model and the pictures, such as those of
            ``parallel.sharding.make_mesh``; None is one device.

        Raises:
          UserError: there is no model, or it is damaged or of another kind.
        """
        if autoencoder_dtype not in ("float32", "bfloat16"):
            raise UserError(f"autoencoder_dtype={autoencoder_dtype!r}: must be float32 or bfloat16")
        processes.devices()
        # What goes to several devices stays on the host until it is divided.
        place = jax.device_put if mesh is None else np.asarray
        found = pretrained.load_model(directory, dtype, place)
        model = cls(*found, autoencoder_dtype=autoencoder_dtype)
        return model if mesh is None else model.on_mesh(mesh)

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
        params = {**self._networks.params, "autoencoder": self._networks.autoencoder_params}
        params = jax.tree.map(np.asarray, params)
        directory = files.expanded(directory)
        if format == "vqd_jax":
            described = {"kind": config_lib.MODEL_KIND, **self.config.to_dict()}
            # It is in the folder; where it came from is nobody's concern elsewhere.
            described["autoencoder"]["path"] = ""
            texts = self.tokenizer.files("tokenizer")
            folder.save(directory, described, params, dtype=dtype, files=texts)
            return
        require(format in WRITERS, f"format={format!r}: vqd_jax, {' or '.join(WRITERS)}")
        writer = importlib.import_module(f"vqd_jax.interop.{format}")
        writer.write(directory, self.config, params, self.tokenizer)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that decides the pictures that a request gets."""
        decisive = {
            "params": self._networks.params,
            "autoencoder": self._networks.autoencoder_params,
            "sizes": [self._networks.described(), str(config_lib.autoencoder_config(self.config))],
            "noise": dataclasses.asdict(self._networks.schedule),
            "tokenizer": self.tokenizer.files("tokenizer"),
        }
        return files.fingerprint(decisive)

    def with_params(self, params: Any) -> "VQDiffusion":
        """The same model with other parameters; compiled functions are shared."""
        other = object.__new__(VQDiffusion)
        networks = self._networks.with_params(params)
        other.__dict__.update(self.__dict__, _networks=networks)
        return other

    def with_decoder(self, directory: str) -> "VQDiffusion":
        """The same model with a decoder that was trained further on the same codes.

        Args:
          directory: a model folder of an autoencoder, or a workdir with one, which
            ``config.autoencoder.decoder_only`` trained.

        Raises:
          UserError: it has other codes, or cannot be read.
        """
        codec = pretrained.load_autoencoder(self.config, pretrained.autoencoder_folder(directory))
        for part, old in self._networks.autoencoder_params.items():
            same = jax.tree.map(np.array_equal, old, codec[part])
            if part not in autoencoder.DECODER and not jax.tree.all(same):
                raise UserError(f"{directory} has other codes than the model: its {part} differs")
        return VQDiffusion(
            self.config, self._networks.params, codec, self.tokenizer,
            autoencoder_dtype=self._autoencoder_dtype,
        )  # fmt: skip

    def on_mesh(self, mesh: Mesh) -> "VQDiffusion":
        """The same model on several devices.

        ``parallel.sharding.RULES`` divide the parameters; ``data`` and ``fsdp`` share the images of
        a batch. Images do not depend on the mesh.
        """
        params, codec = self._networks.params, self._networks.autoencoder_params
        params = jax.device_put(params, sharding.shardings(params, mesh))
        codec = jax.device_put(codec, sharding.replicated(mesh))
        return VQDiffusion(
            self.config, params, codec, self.tokenizer, mesh, self._autoencoder_dtype
        )

    @request.known_words(*request.OPTIONS)
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
            require(alone, "guidance_scale: an unconditional model has nothing to be guided to")
            chosen["guidance_scale"] = 1
        try:
            return choices.settings(
                self._networks.schedule, self._networks.sizes.denoiser.grid, **chosen
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    @request.known_words(*request.OPTIONS)
    def generate(
        self,
        prompts: Sequence[str] | Sequence[int] | str | int | None = None,
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | int | Sequence[str] | Sequence[int] | None = None,
        batch_size: int = 16,
        callback: Callback | None = None,
        callback_steps: int = 10,
        **options: Any,
    ) -> Generation:
        """Pictures of every prompt; image j of prompt i depends on (seed, i, j) and the prompt.

        Args:
          prompts: P texts, or one; an empty text is unconditional, and a long one is cut with a
            warning. For a class-conditional model P labels, as numbers or texts; an empty text is
            no class. For an unconditional model None.
          num_images: J.
          seed: 0..2**32-1. Or P seeds: the images of a prompt are then those that it has alone with
            its seed, whatever the other prompts are.
          negative_prompt: a text or label that guidance leads away from, or P of them; None is the
            empty one.
          batch_size: largest number of images in one call of the network. Other batches have a
            quarter of it, a sixteenth, ..., so that few shapes are compiled.
          callback: is given a ``Preview`` after every ``callback_steps`` steps. Returning False
            cancels the call, and any error that it raises ends it. The pictures are the same.
          callback_steps: network calls between two previews.
          **options: of ``settings``, such as ``num_steps``, ``guidance_scale``, ``truncation``,
            ``rule`` and ``trajectory``. ``known`` and ``initial`` may have a row for each prompt.

        Raises:
          UserError: the model cannot meet the request; the message names the argument.
          generation.Cancelled: the callback returned False.
        """
        require(num_images >= 1, f"num_images={num_images}: must be at least 1")
        if prompts is None and self._kind == "none":
            prompts = [""]
        if isinstance(prompts, str | int | np.integer):
            prompts = [prompts]
        require(prompts is not None and len(prompts) > 0, "generate needs at least one prompt")
        images = request.Images(prompts, num_images, seed, negative_prompt)
        settings = self.settings(**images.spread(options, self._networks.num_tokens))
        wanted = self._rows(images.prompts, images.pairs, settings, images.seeds, images.negatives)
        made = self._networks.draw(wanted, settings, batch_size, callback, callback_steps)
        pixels = self.decode_codes(made.codes)
        shape = (len(prompts), num_images)
        seen = [x if x is None else x.reshape(len(x), *shape, -1) for x in made[1:]]
        return Generation(
            [Image.fromarray(p) for p in pixels],
            pixels.reshape(*shape, *pixels.shape[1:]),
            made.codes.reshape(*shape, -1),
            *seen,
        )

    @request.known_words(*_OF_GENERATE)
    def inpaint(
        self,
        image: Picture | Sequence[Picture],
        mask: Picture | Sequence[Picture],
        prompt: str | int | Sequence[str] | Sequence[int] | None = None,
        *,
        strength: float | None = None,
        paste: bool = False,
        **options: Any,
    ) -> Generation:
        """Pictures whose masked part is made anew; the codes of the rest never change.

        Args:
          image: picture or uint8 [H, W, 3]; cut to a square and resized as in evaluation. Or a list
            of P of them.
          mask: of the same height and width; it is painted where the mask is True, or above half
            of its range. A code is made anew if any of its pixels is painted. Or a list of P.
          prompt: text, label or None, as ``generate`` takes them; or a list of P. A single
            image, mask or prompt serves all of the others.
          strength: what is painted begins from ``image``, noised as by ``edit``; None begins from
            nothing.
          paste: ``Generation.images`` are the pictures that were given, at their own sizes, with
            the masked pixels made anew and all others as they were. ``pixels`` stay what the model
            made.
          **options: of ``generate``.
        """
        images, painted = request.listed(image), request.listed(mask)
        count = max(len(images), len(painted), len(request.listed(prompt)))
        images = request.spread("image", images, count)
        painted = request.spread("mask", painted, count)
        given = list(zip(painted, images, strict=True))
        grid = self._networks.sizes.denoiser.grid
        marks = np.stack([masks.of_tokens(one, of, grid) for one, of in given])
        codes = self.encode_images(images)
        made = self.repaint(codes, marks, prompt, strength=strength, **options)
        if not paste:
            return made
        pasted = [
            masks.paste(pixels, of, one)
            for (one, of), row in zip(given, made.pixels, strict=True)
            for pixels in row
        ]
        return made._replace(images=pasted)

    @request.known_words(*_OF_GENERATE)
    def repaint(
        self,
        codes: np.ndarray,
        mask: np.ndarray,
        prompt: str | int | Sequence[str] | Sequence[int] | None = None,
        *,
        strength: float | None = None,
        **options: Any,
    ) -> Generation:
        """Takes some tokens back and paints them again; all others stay as they are.

        Args:
          codes: int32 [N] or [P, N], such as ``Generation.codes`` or what ``encode_images`` gives.
          mask: bool [N] or [P, N], or with the rows and columns of the token grid: where True, a
            token is taken back.
          prompt, strength, **options: of ``inpaint``.
        """
        size = self._networks.num_tokens
        codes = request.token_codes("codes", codes, size, self._networks.num_codes - 1)
        marks = request.token_marks(mask, size)
        count = max(len(codes), len(marks), len(request.listed(prompt)))
        codes = np.stack(request.spread("codes", codes, count))
        marks = np.stack(request.spread("mask", marks, count))
        for number, mark in enumerate(marks):
            which = f" of picture {number}" if count > 1 else ""
            require(mark.any(), f"the mask{which} is empty: nothing is to be painted")
        options["known"] = np.where(marks, self._networks.num_codes, codes).astype(np.int32)
        if strength is not None:
            options |= {"initial": codes, "strength": strength}
        return self.generate(self._prompts(prompt, count), **options)

    @request.known_words(*_OF_GENERATE)
    def edit(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | int | Sequence[str] | Sequence[int] | None = None,
        *,
        strength: float = 0.5,
        **options: Any,
    ) -> Generation:
        """Pictures that begin from a given one with noise on it: image to image.

        Args:
          image: picture or uint8 [H, W, 3]; cut to a square and resized as in evaluation. Or a list
            of P of them.
          prompt: text, label or None, as ``generate`` takes them; or a list of P. One image or
            prompt serves all of the others.
          strength: share of the noise, above 0 and up to 1; at 1 nothing of ``image`` is left.
          **options: of ``generate``. To begin from codes, give it ``initial`` and ``strength``.
        """
        images = request.listed(image)
        count = max(len(images), len(request.listed(prompt)))
        images = request.spread("image", images, count)
        options |= {"initial": self.encode_images(images), "strength": strength}
        return self.generate(self._prompts(prompt, count), **options)

    def _prompts(self, prompt, count: int) -> list:
        empty = prompt is None and self._kind == "none"
        require(prompt is not None or empty, "a prompt is missing; an empty one is unconditional")
        return request.spread("prompt", request.listed("" if empty else prompt), count)

    @request.known_words()
    def likelihood(
        self,
        images: Picture | Sequence[Picture] | None = None,
        prompts: Sequence[str] | Sequence[int] | str | int | None = None,
        *,
        codes: np.ndarray | None = None,
        num_draws: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Likelihood:
        """How well the model expects pictures: a bound on the bits that their codes take.

        All pictures meet the same noise, so that the bits of a picture are the same alone and among
        others, and a difference of two prompts is a paired one. Guidance has no part in it.

        Args:
          images: P pictures, or one; cut to a square and resized as in evaluation.
          prompts: P texts or labels, or one for all; None for an unconditional model.
          codes: int32 [P, N] instead of ``images``.
          num_draws: times of the schedule that are visited, 2..T; None is all T, each of them once.
            Fewer are faster and less exact.
          seed: decides the noise.
          batch_size: as for ``generate``.
        """
        require((images is None) != (codes is None), "likelihood needs either images or codes")
        if codes is None:
            codes = self.encode_images(request.listed(images))
        codes = request.token_codes(
            "codes", codes, self._networks.num_tokens, self._networks.num_codes - 1
        )
        total = self._networks.schedule.num_steps
        num_draws = total if num_draws is None else num_draws
        require(2 <= num_draws <= total, f"num_draws={num_draws}: must lie in 2..{total}")
        count = max(len(codes), len(request.listed(prompts)))
        codes = np.stack(request.spread("images", codes, count))
        conditions = self._conditions(self._prompts(prompts, count))
        key = jax.random.key(request.seeds(seed, 1)[0])
        of_token = self._networks.likelihood(codes, conditions, key, num_draws, batch_size)
        return Likelihood(of_token, of_token * self._networks.num_tokens)

    def encode_text(self, texts: Sequence[str]) -> jax.Array:
        """Features float32 [B, L, D] of B texts; the empty text has the learned ones, if any."""
        require(self._kind == "text", f"a model with condition {self._kind!r} reads no text")
        return self._networks.text_features(self._conditions.text_ids(texts))

    def encode_images(self, images: Sequence[Picture], batch_size: int = 16) -> np.ndarray:
        """Codes int32 [B, N] of B pictures, uint8 [H, W, 3] each.

        A Gumbel autoencoder gives the likeliest codes. Pictures of another size than S are cut to a
        square and resized.
        """
        require(len(images), "no picture is given")
        side = self.config.data.image_size
        squares = np.stack([square(image, side) for image in images])
        return self._networks.codes(squares, batch_size)

    def decode_codes(self, codes: np.ndarray, batch_size: int = 16) -> np.ndarray:
        """Pictures uint8 [B, S, S, 3] of codes int32 [B, N] in 0..K-1."""
        codes = np.asarray(codes)
        if codes.size and (codes.min() < 0 or codes.max() >= self._networks.num_codes):
            raise UserError(
                f"codes lie in {codes.min()}..{codes.max()}; the model knows "
                f"0..{self._networks.num_codes - 1}"
            )
        return self._networks.pixels(codes, batch_size)

    def reconstruct(self, images: np.ndarray, batch_size: int = 16) -> np.ndarray:
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
        return self._networks.log_x0(codes, condition, time)

    @property
    def _kind(self) -> str:
        return self.config.denoiser.condition

    @request.known_words(*request.OPTIONS)
    def sample_rows(
        self,
        prompts: Sequence[str] | Sequence[int],
        pairs: Sequence[tuple[int, int]],
        *,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | int | Sequence[str] | Sequence[int] | None = None,
        batch_size: int = 16,
        callback: Callback | None = None,
        callback_steps: int = 10,
        **options: Any,
    ) -> sampler.Sample:
        """Single images out of large calls of ``generate``, as NumPy arrays.

        Args:
          prompts: R texts or labels, one for each image.
          pairs: R pairs (i, j): the image is the j-th of the i-th prompt.
          seed, negative_prompt: of ``generate``; one, or one for each image.
          batch_size, callback, callback_steps, **options: of ``generate``. ``known`` and
            ``initial`` may have a row for each image.
        """
        settings = self.settings(**options)
        wanted = self._rows(prompts, pairs, settings, seed, negative_prompt)
        return self._networks.draw(wanted, settings, batch_size, callback, callback_steps)

    def _rows(self, prompts, pairs, settings, seed, negative) -> request.Rows:
        sizes = (self._networks.num_tokens, self._networks.num_codes)
        return request.rows(self._conditions, prompts, pairs, settings, seed, negative, sizes)
