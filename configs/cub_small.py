"""VQ-Diffusion-S on CUB-200-2011: 36 M parameters in the denoiser.

python -m vqd_jax.main --config=configs/cub_small.py --workdir=DIR --config.data.dir=CUB \
    --config.autoencoder.path=MODELS/openimages_f8 --config.text_encoder.path=MODELS/clip_b32

Published: FID 12.97. This config has not been run yet.
"""

from configs import cub, published


def get_config():
    config, base = published.text_small(), cub.get_config()
    config.data.name = base.data.name
    config.training, config.sampling = base.training, base.sampling
    return config
