"""Folders of diffusers' ``VQDiffusionPipeline``, read and written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import schedule
from vqd_jax.errors import UserError
from vqd_jax.interop import clip, folder, tables, taming, tensors, torch_file
from vqd_jax.interop import denoiser as denoiser_keys
from vqd_jax.interop.parts import Part
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

_NULL = "learned_classifier_free_sampling_embeddings"
_STEM = "diffusion_pytorch_model"
_TEXT_STEM = "model"
# Of the scheduler's config: the end points of the released schedule.
_END_POINTS = {
    "alpha_cum_start": schedule.RELEASED_KEEP[0],
    "alpha_cum_end": schedule.RELEASED_KEEP[1],
    "gamma_cum_start": schedule.RELEASED_MASK[0],
    "gamma_cum_end": schedule.RELEASED_MASK[1],
}


def read(directory: str, *, image_size: int | None = None) -> tuple[dict[str, Part], ClipTokenizer]:
    """The parts of a pipeline, and its tokenizer.

    Args:
      directory: with ``model_index.json`` and a folder a component, as safetensors or .bin.
      image_size: S; None takes what the token grid and the autoencoder imply.

    Raises:
      UserError: a component is missing or damaged, has tensors left over, or differs from what this
        program computes.
    """
    root = Path(directory)
    kind = folder.read_json(root / "model_index.json").get("_class_name")
    if kind != "VQDiffusionPipeline":
        raise UserError(f"{root} is a {kind}; only a VQDiffusionPipeline can be converted")
    parts = {}

    source = str(root / "transformer")
    found = _tensors(root / "transformer", _STEM)
    described = folder.read_json(root / "transformer" / "config.json")
    config = denoiser_keys.diffusers_config(described, source)
    null = folder.read_json(root / _NULL / "config.json")
    if null.get("learnable"):
        embeddings = _tensors(root / _NULL, _STEM)
        array = np.asarray(embeddings.pop("embeddings")).astype(np.float32)
        tables.require_all_used(embeddings, (), (), str(root / _NULL))
        parts["null_text"] = Part(None, array, str(root / _NULL))
        config = dataclasses.replace(config, learned_null=True)
    rows, abstract = denoiser_keys.diffusers_rows(config), denoiser_keys.abstract_params(config)
    params, used = tables.read(rows, found, abstract, source)
    tables.require_all_used(found, used, (), source)
    parts["denoiser"] = Part(config, params, source)
    _require_released_schedule(root / "scheduler" / "scheduler_config.json", config)

    source = str(root / "text_encoder")
    found = _tensors(root / "text_encoder", _TEXT_STEM, "pytorch_model")
    described = folder.read_json(root / "text_encoder" / "config.json")
    if described.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise UserError(f"{source} has the activation {described['hidden_act']}, not quick_gelu")
    heads = described.get("num_attention_heads")
    config, params, used = clip.read_text_encoder(found, source, num_heads=heads)
    tables.require_all_used(found, used, clip.IGNORED, source)
    parts["text_encoder"] = Part(config, params, source)

    source = str(root / "vqvae")
    found = _tensors(root / "vqvae", _STEM)
    described = folder.read_json(root / "vqvae" / "config.json")
    config, params, used = taming.read_diffusers(
        found, described, source, grid_size=parts["denoiser"].config.grid[0]
    )
    tables.require_all_used(found, used, (), source)
    parts["autoencoder"] = Part(config, params, source)
    length = parts["text_encoder"].config.context_length
    return parts, ClipTokenizer.from_folder(root / "tokenizer", length)


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
    rows = denoiser_keys.diffusers_rows(sizes.denoiser)
    if not config_lib.has_released_schedule(config):
        raise UserError("diffusers computes the 'released' noise schedule alone")
    codec = config_lib.autoencoder_config(config)
    codec, codec_params = taming.for_diffusers(codec, params["autoencoder"])
    text_rows = tables.prefixed(clip.HUGGINGFACE_TEXT, theirs="text_model.")
    null = {"learnable": "null_text" in params, "hidden_size": sizes.text_encoder.width,
            "length": sizes.text_encoder.context_length}  # fmt: skip
    components = {
        "transformer": (tables.write(rows, params["denoiser"]), _transformer(sizes.denoiser)),
        "text_encoder": (tables.write(text_rows, params["text_encoder"]),
                         _text(sizes.text_encoder)),
        "vqvae": (tables.write(taming.diffusers_rows(codec), codec_params),
                  taming.diffusers_config(codec)),
        _NULL: ({"embeddings": params["null_text"]} if null["learnable"] else {},
                {"_class_name": "LearnedClassifierFreeSamplingEmbeddings", **null}),
    }  # fmt: skip
    scheduler = {"_class_name": "VQDiffusionScheduler", **_END_POINTS,
                 "num_train_timesteps": sizes.denoiser.num_steps,
                 "num_vec_classes": sizes.denoiser.num_codes + 1}  # fmt: skip
    with folder.appearing(Path(directory)) as root:
        for name, (arrays, described) in components.items():
            (root / name).mkdir()
            stem = _TEXT_STEM if name == "text_encoder" else _STEM
            folder.write_shards(root / name, stem, arrays)
            _write_json(root / name / "config.json", described)
        (root / "scheduler").mkdir()
        _write_json(root / "scheduler" / "scheduler_config.json", scheduler)
        (root / "tokenizer").mkdir()
        for name, text in tokenizer.files("tokenizer").items():
            (root / name).write_text(text, encoding="utf-8")
        _write_json(
            root / "tokenizer" / "tokenizer_config.json",
            _TOKENIZER | {"model_max_length": sizes.text_encoder.context_length},
        )
        _write_json(root / "model_index.json", _INDEX)


_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!",
    "do_lower_case": True,
}  # fmt: skip
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


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _tensors(component: Path, *stems: str) -> dict[str, tensors.Tensor]:
    """Tensors of a component: safetensors (in one file or several), or else .bin."""
    for stem in stems:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (component / name).exists():
                return folder.read_shards(component, stem)
        if (component / f"{stem}.bin").exists():
            loaded = torch_file.load(component / f"{stem}.bin")
            return {name: value for name, value in loaded.items() if hasattr(value, "shape")}
    names = " nor ".join(f"{stem}.safetensors or .bin" for stem in stems)
    raise UserError(f"{component} has no {names}")


def _require_released_schedule(path: Path, config) -> None:
    described = folder.read_json(path)
    wanted = {**_END_POINTS, "num_train_timesteps": config.num_steps,
              "num_vec_classes": config.num_codes + 1}  # fmt: skip
    for name, value in wanted.items():
        if not np.isclose(described.get(name, value), value, rtol=1e-6):
            raise UserError(f"{path}: {name} is {described[name]}, only {value} is known here")
