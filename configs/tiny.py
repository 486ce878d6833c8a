"""Both stages at toy size, for tests and a first look at the files of a run.

python -m vqd_jax.main --config=configs/tiny.py --workdir=DIR

It takes under a minute on two CPU cores, most of it compilation. The pictures are blots.
"""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    config.data.image_size = 16
    config.autoencoder.channels = 8
    config.autoencoder.channel_multipliers = (1, 1, 2)
    config.autoencoder.latent_channels = 16
    config.autoencoder.codebook_dim = 8
    config.autoencoder.num_codes = 32
    config.autoencoder.num_steps = 20
    config.autoencoder.warmup_steps = 5
    config.text_encoder.context_length = 16
    config.text_encoder.width = 16
    config.text_encoder.num_layers = 1
    config.text_encoder.num_heads = 1
    config.denoiser.width = 32
    config.denoiser.num_layers = 2
    config.denoiser.num_heads = 2
    # A run is then the same on every processor.
    config.denoiser.product_dtype = "float32"
    config.diffusion.num_steps = 10
    config.training.num_steps = 40
    config.training.warmup_steps = 5
    config.training.eval_every = 20
    config.training.save_every = 5
    config.evaluation.num_images = 16
    config.evaluation.num_draws = 2
    config.sampling.images_per_prompt = 2
    return config
