"""Text to emoji on two CPU cores: both stages, from nothing, in a quarter of an hour.

python -m vqd_jax.main --config=configs/emoji.py --workdir=DIR

A picture has 32x32 pixels and 8x8 tokens, from a codebook of 128. The denoiser has 0.4 M
parameters, and a small text encoder is trained with it. A picture is taken by the square root of
its concept's size: most concepts have one picture, and people have most pictures.

A run on two cores, with huge pages (docs/performance.md), took 11.5 minutes; on a slow day 3,400 of
the 4,400 steps took 15.5. Captions of 200 training objects then brought their own picture, the
nearest of all, in 66.0 +- 3.4 %, and those of 200 people in 52.5 +- 3.5 %
(benchmarks/emoji_retrieval.py --num_steps=25). A token of a training picture cost 2.43 bits, and
one of a validation picture, whose concept the model never saw, 7.52 bits. docs/training.md has the
figures of other sizes.
"""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    # Few codes, and only dead ones are seeded anew: codes that a small network can learn to predict
    # make better pictures than codes that keep every detail.
    config.autoencoder.num_codes = 128
    config.autoencoder.revival_threshold = 0.05
    config.autoencoder.num_steps = 1500
    config.text_encoder.context_length = 32
    config.data.balance_by = "concept"
    # A small network takes more steps in the same time, and learns more in it.
    config.denoiser.width = 64
    config.denoiser.num_layers = 4
    config.denoiser.init_std = 0.06
    config.training.num_steps = 4400
    # Ten steps in one program are faster on two cores than ten programs.
    config.training.steps_per_call = 10
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
