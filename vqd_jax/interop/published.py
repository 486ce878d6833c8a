"""The released ``.pth`` checkpoints, and any file in their layout.

Such a file is a dictionary. ``model`` is the state dict of the whole model. ``ema`` is the averaged
one of its ``transformer`` part, whose names lack that prefix. The rest is state of the training,
which is not read.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import schedule
from vqd_jax.errors import UserError
from vqd_jax.interop import clip_files, denoiser_tables, tables, taming, torch_file
from vqd_jax.interop.tables import Part
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.models.denoiser import DenoiserConfig

_AUTOENCODER = "content_codec."
_DIFFUSION = "transformer."
_DENOISER = "transformer.transformer."
_TEXT = "transformer.condition_emb."
_NULL_TEXT = "transformer.empty_text_embed"
# Where programs put averaged weights.
_EMA = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_params", "EMA")
# The class that stands for none in the published ImageNet models.
IMAGENET_NULL = 1000
_IGNORED = (
    r"transformer\.(log_\w+|Lt_history|Lt_count)",
    *(rf"transformer\.transformer\.{pattern}" for pattern in denoiser_tables.IGNORED),
    # CLIP's projection, which VQ-Diffusion never used.
    r"transformer\.condition_emb\.text_projection",
)


def is_published(loaded: Any) -> bool:
    """Whether a loaded file holds a VQ-Diffusion checkpoint, however it is wrapped."""
    return any(name.startswith(_DENOISER) for name in torch_file.named_tensors(loaded))


def _averaged(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The averaged tensors, as names of the whole model; {} if there are none."""
    key = next((key for key in _EMA if isinstance(loaded.get(key), Mapping)), None)
    found = torch_file.named_tensors(loaded[key]) if key else {}
    if any(name.startswith(_DENOISER) for name in found):
        return found
    return {_DIFFUSION + name: tensor for name, tensor in found.items()}


def read(
    path: str | Path,
    loaded: Mapping[str, Any],
    *,
    weights: str,
    num_heads: int,
    image_size: int | None,
    remap: np.ndarray | None,
) -> dict[str, Part]:
    """The parts of a model.

    Args:
      path: of the file, for messages.
      loaded: what ``torch_file.load`` returned.
      weights: "ema" takes the averaged weights, as the published inference does; "raw" leaves
        them out.
      num_heads: of the denoiser, which no tensor tells; 16 in all released files.
      image_size: side of a picture, in pixels; None takes what the token grid implies, or 256.
      remap: int [codes of the codebook] -> code id; None takes a published one if the numbers of
        codes ask for it.

    Returns:
      {"denoiser": ..., "autoencoder": ..., "text_encoder": ..., "null_text": ...}, without those
      that the file lacks.

    Raises:
      UserError: tensors are missing, left over, of another shape or not finite, or the noise
        schedule is another than the released one.
    """
    source = str(path)
    tensors = torch_file.named_tensors(loaded)
    if weights == "ema":
        averaged = _averaged(loaded)
        if not averaged:
            raise UserError(f"{source} has no averaged weights; use --weights=raw")
        tensors |= averaged
    parts, used = _read_others(tensors, source, image_size, remap)
    names = tables.under(tensors, _DENOISER)
    grid = denoiser_tables.text_grid(names)
    if "autoencoder" in parts:
        grid = parts["autoencoder"].config.grid_size
    config = denoiser_tables.published_config(
        names,
        num_heads=num_heads,
        # Without a tokenizer and a text nothing tells it. Published tokens cover 16 pixels.
        image_grid=grid or (image_size or taming.DEFAULT_IMAGE_SIZE) // 16,
        null_label=IMAGENET_NULL,
        learned_null="null_text" in parts,
        source=source,
    )
    rows, abstract = denoiser_tables.published_rows(config), denoiser_tables.abstract_params(config)
    params, found = tables.read(rows, names, abstract, source)
    parts["denoiser"] = Part(config, params, source)
    used |= {_DENOISER + name for name in found}
    _require_released_schedule(tensors, config, source)
    tables.require_all_used(tensors, used, _IGNORED, source)
    return parts


def _read_others(tensors, source, image_size, remap) -> tuple[dict[str, Part], set[str]]:
    """The parts beside the denoiser, and the names of the tensors that they used."""
    parts, used = {}, set()
    codec, text = tables.under(tensors, _AUTOENCODER), tables.under(tensors, _TEXT)
    if codec:
        names = tables.under(tensors, _DENOISER)
        grid = denoiser_tables.text_grid(names)
        pixels = taming.downsampling(tables.under(codec, "enc."))
        config, params, found = taming.read_released(
            codec,
            source,
            image_size=image_size or (grid * pixels if grid else taming.DEFAULT_IMAGE_SIZE),
            num_codes=denoiser_tables.num_codes(names, source),
            remap=remap,
        )
        parts["autoencoder"] = Part(config, params, source)
        used |= {_AUTOENCODER + name for name in found}
    if text:
        config, params, found = clip_files.read_text_encoder(text, source)
        parts["text_encoder"] = Part(config, params, source)
        used |= {_TEXT + name for name in found}
    if _NULL_TEXT in tensors:
        parts["null_text"] = Part(None, tables.read_array(tensors, _NULL_TEXT, source), source)
        used.add(_NULL_TEXT)
    return parts, used


def _codec(config: AutoencoderConfig, params: Any) -> dict[str, np.ndarray]:
    """Tensors of the image tokenizer; the decoder lists the codebook a second time."""
    params = {name: part for name, part in params.items() if name != "remap"}
    codec = tables.write(taming.released_rows(config), params)
    again = {f"dec.{n.removeprefix('enc.')}": x for n, x in codec.items() if ".quantize." in n}
    return codec | again


def _require_released_schedule(tensors, config: DenoiserConfig, source: str) -> None:
    """The file's cumulative tables must be those of ``schedule.released``."""
    ours = _schedule_buffers(config)
    for name in ("log_cumprod_at", "log_cumprod_ct"):
        if _DIFFUSION + name not in tensors:
            continue
        stored = np.asarray(tensors[_DIFFUSION + name])[: config.num_steps]
        # Float32 logarithms; those of another schedule differ by whole units.
        if stored.shape != (config.num_steps,) or not np.allclose(
            stored, ours[name][: config.num_steps], atol=1e-3
        ):
            raise UserError(
                f"{source} was trained with another noise schedule than the released one: "
                f"{_DIFFUSION + name} differs"
            )


def _schedule_buffers(config: DenoiserConfig) -> dict[str, np.ndarray]:
    """The logarithms that the published code keeps: float32 [T], the cumulative ones [T+1].

    Their index t is our time t + 1; the last cumulative entry is the identity, our time 0. They
    are computed in float64: the replacement mass of a step is a difference of nearly equal numbers.
    """
    keep = np.append(np.linspace(*schedule.RELEASED_KEEP, config.num_steps), 1.0)
    mask = np.append(np.linspace(*schedule.RELEASED_MASK, config.num_steps), 0.0)
    a = keep[:-1] / keep[np.arange(-1, config.num_steps - 1)]
    masked = 1 - mask
    c = 1 - masked[:-1] / masked[np.arange(-1, config.num_steps - 1)]
    tables = {
        "at": a, "bt": (1 - a - c) / config.num_codes, "ct": c, "1_min_ct": 1 - c,
        "cumprod_at": keep, "cumprod_bt": (masked - keep) / config.num_codes,
        "cumprod_ct": mask, "1_min_cumprod_ct": masked,
    }  # fmt: skip
    with np.errstate(divide="ignore"):
        return {f"log_{name}": np.log(x).astype(np.float32) for name, x in tables.items()}


def write(path: str, config: ConfigDict, params: Any, tokenizer: ClipTokenizer) -> None:
    """Writes a file that the published code loads; it appears complete or not at all.

    Args:
      path: of the ``.pth`` file; a code remap goes into ``..._mapping.pt`` beside it.
      config: of the model.
      params: nested dict of NumPy arrays, ``autoencoder`` included.
      tokenizer: of prompts. The file has no place for it: the published code has CLIP's.

    Raises:
      UserError: PyTorch is not installed, or the layout has no place for this model.
      OSError: it cannot be written.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "writing the published layout needs PyTorch: pip install 'vqd_jax[convert]'"
        ) from error

    def as_torch(arrays):
        return {n: torch.from_numpy(np.require(x, requirements="CW")) for n, x in arrays.items()}

    _require_layout(config)
    diffusion = as_torch(_diffusion(config_lib.model_config(config).denoiser, params))
    codec = as_torch(_codec(config_lib.autoencoder_config(config), params["autoencoder"]))
    model = {_AUTOENCODER + name: x for name, x in codec.items()}
    model |= {_DIFFUSION + name: x for name, x in diffusion.items()}
    written = {}
    if "remap" in params["autoencoder"]:
        # The published code reads it from a file of its own.
        remap = params["autoencoder"]["remap"]["full_to_code"].astype(np.int64)
        written[f"{path.removesuffix('.pth')}_mapping.pt"] = torch.from_numpy(remap)
    written[path] = {"last_epoch": 0, "last_iter": 0, "model": model, "ema": diffusion}
    for target, content in written.items():
        try:
            with files.appearing(target) as scratch:
                torch.save(content, scratch)
        except RuntimeError as error:  # PyTorch's name for a failed write.
            raise OSError(f"{target} could not be written: {error}") from error


def _require_layout(config: ConfigDict) -> None:
    networks = config_lib.model_config(config)
    sizes = networks.denoiser
    if not config_lib.has_released_schedule(config):
        raise UserError("the published layout holds the 'released' noise schedule alone")
    if sizes.condition == "text":
        clip_files.require_normalized(networks.text_encoder)
    if sizes.condition == "class" and sizes.num_classes != IMAGENET_NULL:
        raise UserError(
            f"the published layout has {IMAGENET_NULL} classes; this model has {sizes.num_classes}"
        )


def _diffusion(sizes: DenoiserConfig, params: Any) -> dict[str, np.ndarray]:
    """All tensors but those of the image tokenizer, named without ``transformer.``."""
    rows = tables.prefixed(denoiser_tables.published_rows(sizes), theirs="transformer.")
    diffusion = tables.write(rows, params["denoiser"])
    if sizes.condition == "text":
        length = math.prod(sizes.grid)
        mask = np.tril(np.ones((1, 1, length, length), np.float32))
        for layer in range(sizes.num_layers):
            # Never used, but the published code does not train on from a file without it.
            diffusion[f"transformer.blocks.{layer}.attn2.mask"] = mask
        rows = tables.prefixed(clip_files.OPENAI_TEXT, theirs="condition_emb.")
        diffusion |= tables.write(rows, params["text_encoder"])
    if "null_text" in params:
        diffusion["empty_text_embed"] = params["null_text"].astype(np.float64)
    training = dict.fromkeys(("Lt_history", "Lt_count"), np.zeros(sizes.num_steps, np.float32))
    return diffusion | _schedule_buffers(sizes) | training
