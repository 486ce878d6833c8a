"""Coloured shapes from descriptions: a program can measure whether a picture shows what it should.

python -m vqd_jax.main --config=configs/shapes.py --workdir=DIR
python benchmarks/attribute_accuracy.py --workdir=DIR

On pairs of colour and shape that were held out, colour, size, position and the number of objects
were right in 100 % of 200 pictures, and the shape in 97.0 +- 1.2 %, which is what the autoencoder
alone leaves readable. On one slow core the tokenizer and its codes take 4 minutes, and the steps
about 15, at 74 pictures a second.
"""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "shapes_text"
    config.autoencoder.num_codes = 128
    config.autoencoder.revival_threshold = 0.05
    config.autoencoder.num_steps = 2000
    config.text_encoder.context_length = 36
    config.denoiser.num_layers = 4
    config.denoiser.init_std = 0.06
    config.denoiser.scan_unroll = 4
    config.training.num_steps = 2000
    config.training.optimizer = "muon"
    config.training.learning_rate = 4e-3
    config.training.auxiliary_weight = 1e-2
    config.training.ema_decay = 0.995
    config.training.eval_every = 1000
    config.training.save_every = 500
    config.sampling.guidance_scale = 1.5
    config.sampling.prompts = (
        "a small red circle at the top left, white background",
        "a large blue star in the centre, pale pink background",
        "a large green square on the left, grey background",
        "a small yellow cross at the bottom right, pale blue background",
        "",
    )
    return config
