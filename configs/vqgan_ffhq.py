"""The published tokenizer of FFHQ: 16x16 codes of 256x256 pixels, from 1024.

python -m vqd_jax.main --mode=train_autoencoder --config=configs/vqgan_ffhq.py --workdir=DIR \
    --config.data.dir=FFHQ

Published codes learn by gradients; here they are moving averages, and codes that nothing uses are
seeded anew. docs/tokenizer.md describes the losses. This config has not been run yet.
"""

from configs import ffhq, published


def get_config():
    config = ffhq.get_config()
    published.vqgan(config)
    config.autoencoder.codebook_decay = 0.99
    config.autoencoder.revival_threshold = 0.03
    config.autoencoder.adversarial_start = 30_001
    return config
