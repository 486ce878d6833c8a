"""Coloured shapes from their description, where what a picture shows can be measured."""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "shapes_text"
    config.autoencoder.num_codes = 128
    config.autoencoder.num_steps = 1000
    config.text_encoder.context_length = 36
    config.denoiser.num_layers = 4
    config.training.num_steps = 1500
    config.training.eval_every = 500
    config.training.save_every = 500
    config.sampling.prompts = (
        "a small red circle at the top left, white background",
        "a large blue star in the centre, pale pink background",
        "a large green square on the left, grey background",
        "",
    )
    return config
