"""VQ-Diffusion-B on the flowers of Oxford-102: 389 M parameters in the denoiser.

python -m vqd_jax.main --config=configs/oxford102.py --workdir=DIR --config.data.dir=FLOWERS \
    --config.autoencoder.path=MODELS/openimages_f8 --config.text_encoder.path=MODELS/clip_b32

Published: FID 14.88. This config has not been run yet.
"""

from configs import cub


def get_config():
    config = cub.get_config()
    config.data.name = "oxford102_text"
    config.sampling.prompts = (
        "this flower has petals that are pink with white edges",
        "a flower with many thin yellow petals and a brown centre",
        "",
    )
    return config
