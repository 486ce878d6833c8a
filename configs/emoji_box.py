"""The packaged model `emoji`: Noto Emoji at 64x64 pixels, 8x8 tokens of 1024 codes.

python -m vqd_jax.main --mode=train_autoencoder --config=configs/emoji_box.py --workdir=DIR
python -m vqd_jax.main --config=configs/emoji_box.py --workdir=DIR

Pictures are taken by the square root of a concept's size, since most concepts have one picture. The
packaged model went on from there with all pictures equally often: vqd_jax/assets/emoji/README.md.
The pictures of HELD_OUT are never seen: each is a person whose profession, gender and skin tone the
model knows from other pictures.
"""

from vqd_jax.config import default_config

_PROFESSIONS = (
    "health worker", "student", "teacher", "judge", "farmer", "cook", "office worker", "scientist",
    "technologist", "singer", "artist", "pilot", "firefighter", "police officer", "detective",
    "guard", "construction worker", "superhero", "mage", "fairy",
)  # fmt: skip
_TONES = ("light", "medium light", "medium", "medium dark", "dark")
# A woman and a man of each profession, whose tones take turns.
HELD_OUT = tuple(
    f"{gender} {profession}, {_TONES[(i + 2 * j) % 5]} skin tone"
    for i, profession in enumerate(_PROFESSIONS)
    for j, gender in enumerate(("woman", "man"))
)


def get_config():
    config = default_config()
    config.data.image_size = 64
    config.data.balance_by = "concept"
    config.data.hold_out = HELD_OUT
    config.autoencoder.channel_multipliers = (1, 2, 4, 8)
    config.autoencoder.num_codes = 1024
    config.autoencoder.batch_size = 16
    config.autoencoder.num_steps = 3000
    config.autoencoder.squared_weight = 0.5
    config.autoencoder.revival_threshold = 0.1
    config.autoencoder.codebook_decay = 0.98
    config.autoencoder.ema_decay = 0.998
    config.text_encoder.context_length = 32
    config.text_encoder.width = 80
    config.text_encoder.num_heads = 4
    config.denoiser.width = 160
    config.denoiser.init_std = 0.06
    config.denoiser.scan_unroll = 6
    config.training.num_steps = 7000
    config.training.learning_rate = 1.5e-3
    config.training.ema_decay = 0.998
    config.training.auxiliary_weight = 1e-2
    config.training.eval_every = 1000
    config.training.save_every = 250
    config.sampling.num_steps = 25
    config.sampling.guidance_scale = 1.0
    config.sampling.prompts = (
        "red heart",
        "grinning face",
        "woman astronaut, medium skin tone",
        "green apple",
        "sailboat",
        "dog face",
        "woman judge, dark skin tone",
        "",
    )
    return config
