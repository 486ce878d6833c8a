"""VQ-Diffusion-Large, as trained on ITHQ-200M: 1.36 billion parameters in the denoiser.

python -m vqd_jax.main --config=configs/ithq.py --workdir=DIR --config.data.dir=FOLDER \
    --config.autoencoder.path=MODELS/ithq_vqvae --config.text_encoder.path=MODELS/clip_b32

ITHQ is not public, so the data set is a folder of captioned pictures. The published run took about
a month on 96 V100. This config has not been run yet.
"""

from configs import published


def get_config():
    config = published.base()
    published.clip_text(config)
    config.data.name = "image_text_folder"
    config.autoencoder.channels = 64
    config.autoencoder.channel_multipliers = (1, 2, 4, 8)
    config.autoencoder.attention_resolutions = (32,)
    config.autoencoder.codebook_dim = 128
    config.autoencoder.num_codes = 4096
    config.denoiser.width = 1408
    config.denoiser.num_layers = 36
    config.denoiser.learned_null = True
    config.denoiser.remat = "full"
    config.training.learning_rate = 1e-4
    config.training.warmup_steps = 7000
    config.training.batch_size = 768
    config.training.num_steps = 500_000
    config.sampling.guidance_scale = 5.0
    config.sampling.prompts = ("teddy bear playing in the pool", "a city skyline at night", "")
    return config
