"""Text to emoji on two CPU cores: both stages, from nothing, in a quarter of an hour.

python -m vqd_jax.main --config=configs/emoji.py --workdir=DIR

Pictures of 32x32 pixels, 8x8 codes out of 128; 2.1 M parameters in the denoiser, and a small text
encoder that is trained with it. Took 12 min 20 s, cloning and installing included. In the end a
token of a training picture costs 3.06 bits with its caption and 7.96 with another picture's; of a
validation picture, whose concept was never seen, 5.50 and 6.16.
"""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    # Few codes, and revival for dead ones only: codes that a small network can learn to predict
    # make better pictures than codes that keep every detail.
    config.autoencoder.num_codes = 128
    config.autoencoder.revival_threshold = 0.05
    config.autoencoder.num_steps = 2000
    config.text_encoder.context_length = 32
    config.denoiser.init_std = 0.06
    config.denoiser.scan_unroll = 6
    config.training.num_steps = 1900
    config.training.learning_rate = 2e-3
    config.training.auxiliary_weight = 1e-2
    config.training.eval_every = 950
    config.training.save_every = 475
    config.sampling.prompts = (
        "red heart",
        "grinning face",
        "woman firefighter, dark skin tone",
        "green apple",
        "",
    )
    return config
