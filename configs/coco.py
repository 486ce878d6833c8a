"""VQ-Diffusion-B on MS COCO 2014, 256x256 pixels: 389 M parameters in the denoiser.

python -m vqd_jax.main --config=configs/coco.py --workdir=DIR --config.data.dir=COCO \
    --config.autoencoder.path=MODELS/openimages_f8 --config.text_encoder.path=MODELS/clip_b32

COCO holds the publisher's files (annotations/, train2014/, val2014/, or the zips). docs/weights.md
says how to convert the image tokenizer and CLIP. The published run took 14 days on eight V100 and
reached FID 19.75 on 30,000 captions. This config has not been run yet.
"""

from configs import published


def get_config():
    config = published.text_base()
    config.data.name = "coco_text"
    config.training.learning_rate = 2e-4
    # 100 passes over 414,113 captions.
    config.training.num_steps = 1_300_000
    config.sampling.prompts = (
        "A group of elephants walking in muddy water.",
        "A plate of food with broccoli and rice.",
        "A red bus parked on the side of the road.",
        "",
    )
    return config
