"""The published tokenizer of ImageNet: 16x16 codes of 256x256 pixels, from 16384.

python -m vqd_jax.main --mode=train_autoencoder --config=configs/vqgan_imagenet.py --workdir=DIR \
    --config.data.dir=IMAGENET

Published codes learn by gradients; here they are moving averages, and codes that nothing uses are
seeded anew. docs/tokenizer.md describes the losses. This config has not been run yet.
"""

from configs import imagenet, published


def get_config():
    config = imagenet.get_config()
    published.vqgan(config)
    config.autoencoder.codebook_size = 0
    config.autoencoder.num_codes = 16384
    config.autoencoder.codebook_decay = 0.99
    config.autoencoder.revival_threshold = 0.03
    config.autoencoder.adversarial_start = 250_001
    return config
