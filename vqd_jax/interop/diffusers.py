"""Folders of diffusers' ``VQDiffusionPipeline``, read and written."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import schedule
from vqd_jax.errors import UserError
from vqd_jax.interop import (
    clip_files,
    denoiser_tables,
    folder,
    tables,
    taming,
)
from vqd_jax.interop.tables import Part
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

_NULL = "learned_classifier_free_sampling_embeddings"
_STEM = "diffusion_pytorch_model"
_TEXT_STEM = "model"
# The end points of the released schedule, in the config of the scheduler.
_END_POINTS = {
    "alpha_cum_start": schedule.RELEASED_KEEP[0],
    "alpha_cum_end": schedule.RELEASED_KEEP[1],
    "gamma_cum_start": schedule.RELEASED_MASK[0],
    "gamma_cum_end": schedule.RELEASED_MASK[1],
}


def read(directory: str) -> tuple[dict[str, Part], ClipTokenizer]:
    """The parts of a pipeline, and its tokenizer.

    Args:
      directory: of the pipeline; its components hold safetensors or .bin files.

    Raises:
      UserError: a component is missing or damaged, has tensors left over, or differs from what this
        program computes.
    """
    root = Path(directory)
    kind = folder.read_json(root / "model_index.json").get("_class_name")
    if kind != "VQDiffusionPipeline":
        raise UserError(f"{root} is a {kind}; only a VQDiffusionPipeline can be converted")
    parts = {}

    described, found, source = _component(root / "transformer")
    config = denoiser_tables.diffusers_config(described, source)
    if folder.read_json(root / _NULL / "config.json").get("learnable"):
        _, embeddings, place = _component(root / _NULL)
        array = tables.read_array(embeddings, "embeddings", place)
        tables.require_all_used(embeddings, {"embeddings"}, (), place)
        parts["null_text"] = Part(None, array, place)
        config = dataclasses.replace(config, learned_null=True)
    rows, abstract = denoiser_tables.diffusers_rows(config), denoiser_tables.abstract_params(config)
    params, used = tables.read(rows, found, abstract, source)
    tables.require_all_used(found, used, (), source)
    parts["denoiser"] = Part(config, params, source)
    _require_released_schedule(root / "scheduler" / "scheduler_config.json", config)

    described, found, source = _component(root / "text_encoder", _TEXT_STEM, "pytorch_model.bin")
    clip_files.require_quick_gelu(described, source)
    heads = described.get("num_attention_heads")
    config, params, used = clip_files.read_text_encoder(found, source, num_heads=heads)
    tables.require_all_used(found, used, clip_files.IGNORED, source)
    parts["text_encoder"] = Part(config, params, source)

    described, found, source = _component(root / "vqvae")
    config, params, used = taming.read_diffusers(
        found, described, source, grid_size=parts["denoiser"].config.grid[0]
    )
    tables.require_all_used(found, used, (), source)
    parts["autoencoder"] = Part(config, params, source)
    length = parts["text_encoder"].config.context_length
    return parts, ClipTokenizer.from_folder(root / "tokenizer", length)


def _component(path: Path, stem: str = _STEM, old: str = f"{_STEM}.bin") -> tuple[dict, dict, str]:
    """The config of a component, its tensors by name, and where it is."""
    described = folder.read_json(path / "config.json")
    return described, folder.read_weights(path, stem, old), str(path)


def write(directory: str, config: ConfigDict, params: Any, tokenizer: ClipTokenizer) -> None:
    """Writes a folder that ``diffusers.VQDiffusionPipeline`` loads; complete or not at all.

    Args:
      directory: the target.
      config: of the model.
      params: nested dict of NumPy arrays, ``autoencoder`` included.
      tokenizer: of prompts.

    Raises:
      UserError: diffusers has no place for this kind of model.
      OSError: it cannot be written.
    """
    sizes = config_lib.model_config(config)
    rows = denoiser_tables.diffusers_rows(sizes.denoiser)
    if not config_lib.has_released_schedule(config):
        raise UserError("diffusers computes the 'released' noise schedule alone")
    clip_files.require_normalized(sizes.text_encoder)
    codec = config_lib.autoencoder_config(config)
    codec, codec_params = taming.for_diffusers(codec, params["autoencoder"])
    text_rows = tables.prefixed(clip_files.HUGGINGFACE_TEXT, theirs="text_model.")
    null = {"embeddings": params["null_text"]} if "null_text" in params else {}
    components = {
        "transformer": tables.write(rows, params["denoiser"]),
        "text_encoder": tables.write(text_rows, params["text_encoder"]),
        "vqvae": tables.write(taming.diffusers_rows(codec), codec_params),
        _NULL: null,
    }
    descriptions = {
        "transformer/config.json": _transformer(sizes.denoiser),
        "text_encoder/config.json": _text(sizes.text_encoder),
        "vqvae/config.json": taming.diffusers_config(codec),
        f"{_NULL}/config.json": _null(sizes.text_encoder, bool(null)),
        "scheduler/scheduler_config.json": _noise(sizes.denoiser)
        | {"_class_name": "VQDiffusionScheduler"},
        "tokenizer/tokenizer_config.json": _tokenizer(sizes.text_encoder),
        "model_index.json": _INDEX,
    }
    with folder.appearing(directory) as root:
        for name, described in descriptions.items():
            files.write_json(root / name, described)
        for name, arrays in components.items():
            stem = _TEXT_STEM if name == "text_encoder" else _STEM
            folder.write_shards(root / name, stem, arrays)
        for name, text in tokenizer.files("tokenizer").items():
            files.write_text(root / name, text)


_INDEX = {
    "_class_name": "VQDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    _NULL: ["diffusers", "LearnedClassifierFreeSamplingEmbeddings"],
    "scheduler": ["diffusers", "VQDiffusionScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "Transformer2DModel"],
    "vqvae": ["diffusers", "VQModel"],
}


def _null(c: TextEncoderConfig, learnable: bool) -> dict:
    return {
        "_class_name": "LearnedClassifierFreeSamplingEmbeddings",
        "learnable": learnable,
        "hidden_size": c.width,
        "length": c.context_length,
    }


def _noise(c: DenoiserConfig) -> dict:
    return _END_POINTS | {"num_train_timesteps": c.num_steps, "num_vec_classes": c.num_codes + 1}


def _tokenizer(c: TextEncoderConfig) -> dict:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!",
        # It pads to this length, and the text encoder has no position beyond it.
        "model_max_length": c.context_length,
        "do_lower_case": True,
    }


def _transformer(c: DenoiserConfig) -> dict:
    return {
        "_class_name": "Transformer2DModel",
        "activation_fn": "geglu-approximate",
        "attention_bias": True,
        "attention_head_dim": c.width // c.num_heads,
        "cross_attention_dim": c.text_width,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "norm_type": "ada_norm",
        "num_attention_heads": c.num_heads,
        "num_embeds_ada_norm": c.num_steps,
        "num_layers": c.num_layers,
        "num_vector_embeds": c.num_codes + 1,
        "sample_size": c.grid[0],
    }


def _text(c: TextEncoderConfig) -> dict:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": c.vocab_size - 2,
        "eos_token_id": c.vocab_size - 1,
        "pad_token_id": 0,
        "hidden_act": "quick_gelu",
        "hidden_size": c.width,
        "intermediate_size": 4 * c.width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": c.context_length,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "projection_dim": c.width,
        "vocab_size": c.vocab_size,
    }


def _require_released_schedule(path: Path, config) -> None:
    described = folder.read_json(path)
    for name, value in _noise(config).items():
        if not np.isclose(described.get(name, value), value, rtol=1e-6):
            raise UserError(f"{path}: {name} is {described[name]}, only {value} is possible")
