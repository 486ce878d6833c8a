"""Unconditional VQ-Diffusion on the faces of FFHQ, 256x256 pixels: 411 M parameters.

python -m vqd_jax.main --config=configs/ffhq.py --workdir=DIR --config.data.dir=FFHQ \
    --config.autoencoder.path=MODELS/ffhq_f16

Published: FID 6.33. This config has not been run yet.
"""

from configs import published


def get_config():
    config = published.base()
    published.f16(config)
    config.data.name = "ffhq_images"
    config.autoencoder.num_codes = 1024
    config.denoiser.condition = "none"
    config.denoiser.num_layers = 20
    config.training.learning_rate = 4.5e-4
    config.training.warmup_steps = 2000
    config.training.batch_size = 256
    # 300 passes over 70,000 pictures.
    config.training.num_steps = 82_000
    config.sampling.guidance_scale = 1.0
    config.sampling.truncation = 0.86
    config.sampling.prompts = ("",)
    return config
