"""Text to emoji on two CPU cores: both stages, from nothing, in a quarter of an hour."""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    config.autoencoder.num_steps = 2400
    config.text_encoder.context_length = 32
    config.training.num_steps = 1800
    config.training.eval_every = 600
    config.training.save_every = 300
    config.sampling.prompts = (
        "red heart",
        "grinning face",
        "woman firefighter, dark skin tone",
        "person in suit levitating, light skin tone",
        "",
    )
    return config
