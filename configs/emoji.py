"""Text to emoji on two CPU cores: both stages, from nothing, in a quarter of an hour."""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    config.text_encoder.context_length = 32
    config.training.num_steps = 1600
    return config
