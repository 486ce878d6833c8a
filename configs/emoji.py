"""Text to emoji on two CPU cores: both stages, from nothing, in a quarter of an hour.

python -m vqd_jax.main --config=configs/emoji.py --workdir=DIR

A picture has 32x32 pixels and 8x8 tokens, from a codebook of 128. The denoiser has 2.1 M
parameters, and a small text encoder is trained with it. The autoencoder and the codes took 3
minutes, and the steps 13 min 21 s, on two slow cores and without the installation. A token of a
training picture cost 2.14 bits in the end with its own caption and 10.46 bits with another
picture's. For validation pictures, whose concepts the model never saw, it was 6.42 and 7.15 bits.
Captions of 200 training people brought their own picture, the nearest of all, in 84.0 +- 2.6 %,
those of 200 objects in 8.5 +- 2.0 % (benchmarks/emoji_retrieval.py). 2,600 steps of AdamW had
brought 69 and 5 %.

Most concepts have one picture, and people have most pictures. To take rare concepts more often
gives to the objects what it takes from the people: with data.balance_by="concept", the same steps
brought 35.5 +- 3.4 % of the people and 22.0 +- 2.9 % of the objects (docs/training.md has more).
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
    config.training.num_steps = 2600
    config.training.optimizer = "muon"
    config.training.learning_rate = 4e-3
    config.training.auxiliary_weight = 1e-2
    config.training.ema_decay = 0.995
    config.training.eval_every = 1300
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
