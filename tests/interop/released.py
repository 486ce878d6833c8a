"""Checkpoints in the layout of the released text models, made of given numbers."""

import numpy as np
from torch_writer import tensor

from vqd_jax.interop import clip_files as clip
from vqd_jax.interop import denoiser_tables, tables

_STORAGES = {"f2": "HalfStorage", "f4": "FloatStorage", "f8": "DoubleStorage"}


def fill(abstract, draw):
    """``draw(shape)`` float32 for every leaf of ``abstract``, a nested dict."""
    if isinstance(abstract, dict):
        return {name: fill(part, draw) for name, part in abstract.items()}
    return draw(abstract.shape).astype(np.float32)


def text_names(params):
    """A CLIP text tower: matrices in half precision, its unused projection too."""
    names = tables.write(clip.OPENAI_TEXT, params)
    width = params["position_embedding"].shape[1]
    names["text_projection"] = np.zeros((width, width))
    halves = ("attn.", "mlp.", "text_projection")
    return {
        name: array.astype(np.float16 if any(half in name for half in halves) else np.float32)
        for name, array in names.items()
    }


def denoiser_names(config, params):
    """A denoiser, with the causal masks that nothing uses."""
    names = tables.write(denoiser_tables.published_rows(config), params)
    size = config.grid[0] * config.grid[1]
    for layer in range(config.num_layers):
        names[f"blocks.{layer}.attn2.mask"] = np.ones((1, 1, size, size), np.float32)
    return {name: np.ascontiguousarray(array) for name, array in names.items()}


def codec_names(stored):
    """An image tokenizer, its names those of taming; all of its codebook listed twice."""
    names = {}
    for name, array in stored.items():
        encodes = name.startswith(("encoder.", "quant_conv.", "quantize."))
        sides = ("enc", "dec") if name.startswith("quantize.") else ("enc" if encodes else "dec",)
        names |= {f"{side}.{name}": array for side in sides}
    return names


def schedule_names(num_steps):
    """The cumulative tables that every released file has; their last entry is the identity."""
    keep = np.append(np.linspace(0.99999, 0.000009, num_steps), 1)
    mask = np.append(np.linspace(0.000009, 0.99999, num_steps), 0)
    with np.errstate(divide="ignore"):
        tables = {"log_cumprod_at": np.log(keep), "log_cumprod_ct": np.log(mask)}
    tables |= {"Lt_history": np.zeros(num_steps), "Lt_count": np.zeros(num_steps)}
    return {name: array.astype(np.float32) for name, array in tables.items()}


def checkpoint(codec, diffusion, averaged, moments=False):
    """What ``torch_writer.write`` takes.

    Args:
      codec: tensors of the image tokenizer by name, without ``content_codec.``.
      diffusion: of the rest, without ``transformer.``.
      averaged: those of them that are averaged, with other values.
      moments: keep the two moments of the optimizer, of the averaged ones' sizes.
    """
    model = {f"content_codec.{name}": array for name, array in codec.items()}
    model |= {f"transformer.{name}": array for name, array in diffusion.items()}
    content = {"last_epoch": 1, "last_iter": 2, "model": _tensors(model, "model")}
    content["ema"] = _tensors(diffusion | averaged, "ema")
    if moments:
        first, second = _tensors(averaged, "first"), _tensors(averaged, "second")
        state = {
            index: {"step": 2, "exp_avg": first[name], "exp_avg_sq": second[name]}
            for index, name in enumerate(averaged)
        }
        optimizer = {"module": {"state": state, "param_groups": []}, "step_iteration": 1}
        content["optimizer_and_scheduler"] = {"none": {"optimizer": optimizer}}
    return content


def _tensors(names, key):
    return {
        name: tensor(_STORAGES[array.dtype.str[1:]], np.ascontiguousarray(array), f"{key}.{name}")
        for name, array in names.items()
    }
