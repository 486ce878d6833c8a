"""Text to emoji on two CPU cores: both stages, from nothing, in a quarter of an hour."""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    config.autoencoder.num_steps = 2400
    config.autoencoder.batch_size = 8
    config.autoencoder.learning_rate = 2e-3
    config.autoencoder.squared_weight = 1.0
    config.autoencoder.codebook_decay = 0.95
    config.autoencoder.revival_threshold = 0.3
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
