"""VQ-Diffusion-S on a folder of your own captioned pictures: 36 M parameters in the denoiser.

python -m vqd_jax.main --config=configs/folder.py --workdir=DIR --config.data.dir=FOLDER \
    --config.autoencoder.path=MODELS/openimages_f8 --config.text_encoder.path=MODELS/clip_b32

FOLDER has a metadata.jsonl or .csv, a .txt beside every picture, or the tars of img2dataset. To
begin from a released model instead, give --config.training.init_from=MODEL and the model's sizes
(configs/coco.py has those of the released text models).
"""

from configs import published


def get_config():
    config = published.text_small()
    config.data.name = "image_text_folder"
    config.training.learning_rate = 4.5e-4
    config.training.num_steps = 100_000
    config.sampling.prompts = ("a photo", "")
    return config
