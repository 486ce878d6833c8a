"""Published weights become a model folder.

A source is a released VQ-Diffusion checkpoint, a folder of diffusers, an image tokenizer on its own
(taming, ITHQ), or a CLIP; its content tells which. Files may come in parts.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.errors import UserError
from vqd_jax.interop import (
    clip_files,
    diffusers,
    folder,
    published,
    published_yaml,
    taming,
    torch_file,
)
from vqd_jax.interop.tables import Part

_RELEASED_HEADS = 16


def convert(
    source: str,
    target: str,
    *,
    weights: str = "ema",
    autoencoder: str | None = None,
    clip: str | None = None,
    remap: str | None = None,
    num_heads: int | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
) -> None:
    """Reads ``source``, logs what was found and writes a model folder.

    Args:
      source: file, first part of a file, or folder.
      target: folder to write; it appears complete or not at all.
      weights: "ema" or "raw", if the file has both.
      autoencoder: file with the image tokenizer; None takes the one in ``source``.
      clip: file or folder with the CLIP; None takes the one in ``source``.
      remap: .npy or .pt file with the code remap, if it is none of the published ones.
      num_heads: heads of the denoiser, which no tensor tells; None takes those of the config.yaml
        beside ``source``, or 16, as in all released files.
      image_size: side of a picture, in pixels; None takes what the file or the config.yaml
        implies, or 256.
      dtype: of the stored floats, "float32" or "bfloat16".

    Raises:
      UserError: the source is of no known kind, incomplete, damaged, or has tensors left over.
      OSError: the target cannot be written.
    """
    folder.require_replaceable(Path(target))
    table = None if remap is None else read_remap(remap)
    if (Path(source) / "model_index.json").exists():
        parts, tokenizer = diffusers.read(source)
        return _write_model(target, parts, tokenizer, dtype)
    if (Path(source) / "config.json").exists() and "kind" in folder.load_config(source):
        raise UserError(f"{source} is a model folder of this program already")
    if Path(source).is_dir() or source.endswith(".safetensors"):
        return _write_clip(source, target, dtype)
    loaded = torch_file.load(source)
    if published.is_published(loaded):
        parts = _read_published(
            source, loaded, weights, autoencoder, clip, table, num_heads, image_size
        )
        return _write_model(target, parts, None, dtype)
    if taming.is_autoencoder(loaded):
        part = read_autoencoder(source, image_size, table)
        _print_table({"autoencoder": part})
        sizes = dataclasses.asdict(part.config)
        return folder.save(target, {"kind": "autoencoder", **sizes}, part.params, dtype=dtype)
    if not torch_file.named_tensors(loaded):
        keys = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else ""
        raise UserError(
            f"{source} holds no weights with names: it is {type(loaded).__name__} {keys[:200]}"
        )
    return _write_clip(source, target, dtype)


def _read_published(
    source, loaded, weights, autoencoder, clip, table, num_heads, image_size
) -> dict[str, Part]:
    """The parts of a released checkpoint; arguments as in ``convert``."""
    described = published_yaml.beside(source)
    if table is None and described.remap is not None:
        table = read_remap(str(described.remap))
    image_size = image_size or described.image_size
    num_heads = num_heads or described.num_heads or _RELEASED_HEADS
    try:
        parts = published.read(
            source, loaded, weights=weights, num_heads=num_heads, image_size=image_size,
            remap=table,
        )  # fmt: skip
    except UserError as error:
        if described.wants_remap and table is None:
            name = described.wants_remap
            raise UserError(f"{error}. The config.yaml asks for the remap {name}") from error
        raise
    if autoencoder is not None:
        codes = parts["denoiser"].config.num_codes
        parts["autoencoder"] = read_autoencoder(autoencoder, image_size, table, codes)
    if clip is not None:
        found = clip_files.open_weights(clip)
        config, params, _ = clip_files.read_text_encoder(found, clip)
        parts["text_encoder"] = Part(config, params, clip)
    return parts


def read_autoencoder(
    path: str,
    image_size: int | None = None,
    remap: np.ndarray | None = None,
    num_codes: int | None = None,
) -> Part:
    """The image tokenizer in a published file or in a model folder.

    Args:
      path: of the file or folder.
      image_size, remap: see ``convert``.
      num_codes: number of codes of its denoiser, which may tell the remap; None is any.
    """
    if Path(path).is_dir():
        described = folder.load_config(path)
        described.pop("kind", None)
        config = taming.config_from_dict(described, path)
        return Part(config, folder.load_params(path, taming.abstract_params(config)), path)
    loaded = torch_file.load(path)
    if not taming.is_autoencoder(loaded):
        raise UserError(f"{path} holds no image tokenizer that this program knows")
    config, params = taming.read(
        loaded,
        path,
        image_size=image_size or taming.DEFAULT_IMAGE_SIZE,
        num_codes=num_codes,
        remap=remap,
    )
    return Part(config, params, path)


def read_remap(path: str) -> np.ndarray:
    """Code remap int64 [codes of the codebook] from an .npy or a PyTorch file.

    Raises:
      UserError: it is no vector of whole numbers that are at least 0.
    """
    try:
        loaded = np.load(path) if path.endswith(".npy") else np.asarray(torch_file.load(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a code remap: {error}") from error
    if loaded.ndim != 1 or loaded.dtype.kind not in "iu" or not loaded.size or loaded.min() < 0:
        raise UserError(
            f"{path} is no code remap: it needs one code id, 0 or more, for every code of the "
            "codebook"
        )
    return loaded.astype(np.int64)


def model_config(parts: Mapping[str, Part]) -> ConfigDict:
    """The config of a model with these parts, and with the sampling that its authors recommend.

    Raises:
      UserError: the parts do not fit each other.
    """
    config = config_lib.default_config()
    codec, denoiser = parts["autoencoder"].config, parts["denoiser"].config
    sizes = {"autoencoder": codec, "denoiser": denoiser}
    if denoiser.condition == "text":
        sizes["text_encoder"] = parts["text_encoder"].config
    for name, found in sizes.items():
        section = config[name]
        for field, value in dataclasses.asdict(found).items():
            # How a model computes is no part of what was published.
            if field in section and field != "product_dtype":
                # A config has no None: an empty value of the field's type says the same.
                section[field] = type(section[field])() if value is None else value
    config.data.image_size = codec.image_size
    config.diffusion.num_steps = denoiser.num_steps
    if (codec.grid_size, codec.grid_size) != denoiser.grid:
        raise UserError(
            f"the denoiser has a grid of {denoiser.grid} codes, and the image tokenizer one of "
            f"{(codec.grid_size, codec.grid_size)}: they do not belong together"
        )
    if codec.num_codes != denoiser.num_codes:
        raise UserError(
            f"the denoiser knows {denoiser.num_codes} codes and the image tokenizer has "
            f"{codec.num_codes}: they do not belong together, or a --remap is missing"
        )
    _recommend_sampling(config)
    config_lib.validate(config, own_tokenizer=True)
    return config


def _recommend_sampling(config: ConfigDict) -> None:
    """Guidance and truncation of the published README."""
    scale, rate = 1.0, 0.86
    if config.denoiser.learned_null:
        if config.denoiser.condition == "class":
            scale, rate = 1.5, 0.94
        else:
            scale, rate = (5.0 if config.autoencoder.num_codes == 4096 else 3.0), 1.0
    config.sampling.guidance_scale, config.sampling.truncation = scale, rate
    prompts = {
        "text": ("A group of elephants walking in muddy water.", "teddy bear playing in the pool"),
        "class": ("207", "388"),
        "none": ("",),
    }
    config.sampling.prompts = prompts[config.denoiser.condition]


def _write_model(target, parts, tokenizer, dtype) -> None:
    missing = [name for name in ("denoiser", "autoencoder") if name not in parts]
    if parts["denoiser"].config.condition == "text" and "text_encoder" not in parts:
        missing.append("text_encoder")
    if missing:
        raise UserError(
            f"{parts['denoiser'].source} lacks {' and '.join(missing)}; give the files with "
            "--autoencoder=FILE and --clip=FILE"
        )
    config = model_config(parts)
    _print_table(parts)
    params = {name: part.params for name, part in parts.items()}
    tokenizer = tokenizer or ClipTokenizer(config.text_encoder.context_length)
    files = tokenizer.files("tokenizer") if config.denoiser.condition == "text" else {}
    described = {"kind": config_lib.MODEL_KIND, **config.to_dict()}
    folder.save(target, described, params, dtype=dtype, files=files)


def _write_clip(source: str, target: str, dtype: str) -> None:
    config, params = clip_files.load(source)
    _print_table({"clip": Part(config, params, source)})
    described = {"kind": "clip", **dataclasses.asdict(config)}
    folder.save(target, described, params, dtype=dtype, files=ClipTokenizer().files("tokenizer"))


def _print_table(parts: Mapping[str, Part]) -> None:
    """Logs what was found."""
    for name, part in parts.items():
        size = f"{sum(map(np.size, jax.tree.leaves(part.params))):13,}"
        logging.info("%-13s%s parameters  %s  from %s", name, size, _summary(part), part.source)


def _summary(part: Part) -> str:
    sizes = {
        "num_codes": "codes", "grid": "grid", "width": "wide", "num_layers": "layers",
        "num_heads": "heads", "condition": "condition", "image_size": "pixels",
        "quantizer": "quantizer", "embedding_width": "wide",
    }  # fmt: skip
    described = [
        f"{word} {getattr(part.config, field)}"
        for field, word in sizes.items()
        if hasattr(part.config, field)
    ]
    return ", ".join(described) or "learned features of the empty caption"
