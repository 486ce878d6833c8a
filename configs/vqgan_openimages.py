"""The published Gumbel tokenizer of OpenImages: 32x32 codes of 256x256 pixels, from 8192.

python -m vqd_jax.main --mode=train_autoencoder --config=configs/vqgan_openimages.py --workdir=DIR \
    --config.data.dir=PICTURES

The set is a folder of captioned pictures here, as in configs/folder.py. The sizes are the published
ones. The released files do not say how it was trained: the loss is that of the ImageNet tokenizer,
the temperature falls from 1 to 1/16, and the weight of the KL term is 5e-4. docs/tokenizer.md
describes the losses. This config has not been run yet.
"""

from configs import published


def get_config():
    config = published.text_base()
    published.vqgan(config)
    config.data.name = "image_text_folder"
    config.autoencoder.codebook_size = 0
    config.autoencoder.num_codes = 8192
    config.autoencoder.temperature_steps = 250_000
    config.autoencoder.kl_weight = 5e-4
    config.autoencoder.adversarial_start = 250_001
    return config
