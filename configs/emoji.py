"""Text to emoji on two CPU cores: both stages, from nothing, in about half an hour.

python -m vqd_jax.main --config=configs/emoji.py --workdir=DIR

A picture has 32x32 pixels and 8x8 tokens, from a codebook of 128. The denoiser has 0.8 M
parameters, and a small text encoder is trained with it. A picture is taken by the square root of
its concept's size: most concepts have one picture, and people have most pictures.

On two slow cores a run of 2,600 steps took 22.5 minutes, 7 of them for the autoencoder. The figures
are of 4,400 steps. Captions of 200 training objects then brought
their own picture, the nearest of all, in 81.0 +- 2.8 %, and those of 200 people in 63.0 +- 3.4 %
(benchmarks/emoji_retrieval.py --num_steps=10). A token of a training picture cost 1.81 bits, and
one of a validation picture, whose concept the model never saw, 7.74 bits. docs/training.md compares
sizes.
"""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    # Few codes, and only dead ones are seeded anew: codes that a small network can learn to predict
    # make better pictures than codes that keep every detail.
    config.autoencoder.num_codes = 128
    config.autoencoder.revival_threshold = 0.05
    config.autoencoder.num_steps = 2000
    config.text_encoder.context_length = 32
    config.data.balance_by = "concept"
    # A small network takes more steps in the same time, and learns more in it.
    config.denoiser.width = 96
    config.denoiser.num_layers = 4
    config.denoiser.init_std = 0.06
    config.denoiser.scan_unroll = 4
    config.training.num_steps = 4400
    config.training.optimizer = "muon"
    config.training.learning_rate = 4e-3
    config.training.auxiliary_weight = 1e-2
    config.training.ema_decay = 0.995
    config.training.eval_every = 2200
    config.training.save_every = 500
    config.sampling.guidance_scale = 1.5
    config.sampling.prompts = (
        "red heart",
        "grinning face",
        "woman firefighter, dark skin tone",
        "green apple",
        "",
    )
    return config
