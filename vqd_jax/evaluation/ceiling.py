"""What bounds a model's figures: real pictures after a pass through its autoencoder; and what its
captions tell it, in bits.

Letters: N pictures, B batch, S image side, K codes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqd_jax import files
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.evaluation import distances, likelihood, measures
from vqd_jax.evaluation.pictures import Decoded, Pictures
from vqd_jax.interop import perceptual_files
from vqd_jax.models import perceptual
from vqd_jax.parallel import rows, sharding
from vqd_jax.pipeline import VQDiffusion

# Pictures whose reconstructions are compared one by one.
COMPARED = 2000
_BLOCK = 128


def reconstructed(model: VQDiffusion, pictures: Pictures, autoencoder_params: Any) -> Decoded:
    """Pictures after a pass through the autoencoder."""
    identity = {"autoencoder": files.fingerprint(autoencoder_params)}
    return Decoded(pictures, model.reconstruct, identity)


def of_reconstructions(model: VQDiffusion, pictures: Pictures) -> dict[str, Any]:
    """PSNR in dB, SSIM, the perceptual distance in SqueezeNet, and the use of the codes.

    Args:
      model: its autoencoder is looked at.
      pictures: N real ones; the first ``COMPARED`` are taken.
    """
    network, params = perceptual_files.load("squeezenet")
    compare = jax.jit(
        lambda a, b: perceptual.distance(params, _signed(a), _signed(b), config=network)
    )
    found = {"psnr": [], "ssim": [], "perceptual": []}
    counts = np.zeros(model.config.autoencoder.num_codes, np.int64)
    size = min(len(pictures), COMPARED)
    for start in range(0, size, _BLOCK):
        real = pictures.read(range(start, min(start + _BLOCK, size)))
        codes = model.encode_images(real)
        again = model.decode_codes(codes)
        counts += np.bincount(codes.reshape(-1), minlength=len(counts))
        found["psnr"].append(measures.psnr(real, again))
        found["ssim"].append(measures.ssim(real, again))
        pair = rows.in_batches(lambda pair: compare(*pair), (real, again), _BLOCK)
        found["perceptual"].append(pair)
    means = {
        name: distances.mean_estimate(np.concatenate(values)) for name, values in found.items()
    }
    return means | measures.code_use(counts)


def _signed(pixels: jax.Array) -> jax.Array:
    return pixels.astype(jnp.float32) / 127.5 - 1


def caption_gap(
    config: ConfigDict, model: VQDiffusion, params: Any, pictures: Pictures, texts: list[str]
) -> dict[str, Any]:
    """Bits a token with right and with shuffled captions, of held-out pictures.

    Args:
      config: of the model; ``evaluation`` says how many draws there are.
      model: for the codes.
      params: of ``models.conditioned``.
      pictures: N real ones.
      texts: a caption of each, or its label.
    """
    codes = model.encode_images(pictures.read(range(len(pictures))))
    if config.denoiser.condition == "text":
        tokenizer = model.tokenizer or ClipTokenizer(config.text_encoder.context_length)
        conditions = tokenizer.encode_batch(texts)
    else:
        conditions = np.array([int(text) for text in texts], np.int32)
    mesh = sharding.make_mesh(config, jax.local_devices())
    found = likelihood.Bound(config, mesh)(params, codes.astype(np.int32), conditions)
    return {
        "bits_per_token": found.right,
        "bits_per_token_shuffled": found.shuffled,
        "difference_in_standard_errors": found.difference_in_standard_errors,
        "pictures": len(codes),
    }
