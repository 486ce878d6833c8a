"""VQ-Diffusion-B on CUB-200-2011 with the captions of Reed et al.: 389 M parameters.

python -m vqd_jax.main --config=configs/cub.py --workdir=DIR --config.data.dir=CUB \
    --config.autoencoder.path=MODELS/openimages_f8 --config.text_encoder.path=MODELS/clip_b32

The published run began from a model of Conceptual Captions (--config.training.init_from=MODEL). It
took 5 days on eight V100 and reached FID 11.94. This config has not been run yet.
"""

from configs import published


def get_config():
    config = published.text_base()
    config.data.name = "cub_text/published"
    config.training.learning_rate = 4.5e-4
    # 400 passes over 8,855 pictures.
    config.training.num_steps = 110_000
    config.sampling.guidance_scale = 1.0
    config.sampling.truncation = 0.86
    config.sampling.prompts = (
        "this bird has wings that are brown and has a red head",
        "a small yellow bird with a black crown and a short beak",
        "a large white bird with orange feet",
        "",
    )
    return config
