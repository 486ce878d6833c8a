"""A VQGAN on a folder of your own pictures: 32x32 codes of 256x256 pixels, 67 M parameters.

python -m vqd_jax.main --mode=train_autoencoder --config=configs/vqgan_f8.py --workdir=DIR \
    --config.data.dir=PICTURES

PICTURES is a folder as configs/folder.py takes it; other sets are named by --config.data.name. It
is the network of the published OpenImages tokenizer with a nearest codebook of 8192 codes, trained
by what is known to work best today: absolute error, a perceptual distance, a discriminator with
blurred halvings from the 20,000th step on, LeCam regularisation and averaged weights. To go on from
a trained one, give --config.autoencoder.init_from=MODEL. docs/tokenizer.md says what to look at and
docs/scaling.md what it takes of a device. This config has not been run yet.
"""

from configs import published


def get_config():
    config = published.text_small()
    published.vqgan(config)
    config.data.name = "image_text_folder"
    config.data.flip = True
    config.autoencoder.quantizer = "nearest"
    config.autoencoder.codebook_size = 0
    config.autoencoder.num_codes = 8192
    config.autoencoder.codebook_decay = 0.99
    config.autoencoder.revival_threshold = 0.03
    config.autoencoder.batch_size = 64
    config.autoencoder.num_steps = 500_000
    config.autoencoder.learning_rate = 1e-4
    config.autoencoder.warmup_steps = 5_000
    config.autoencoder.adam_b1 = 0.0
    config.autoencoder.ema_decay = 0.9999
    config.autoencoder.commitment = 0.25
    config.autoencoder.squared_weight = 0.0
    config.autoencoder.perceptual_weight = 1.0
    config.autoencoder.adversarial_weight = 0.1
    config.autoencoder.adaptive_weight = False
    config.autoencoder.adversarial_start = 20_000
    config.autoencoder.adversarial_warmup = 5_000
    config.autoencoder.discriminator = "blurpool"
    config.autoencoder.discriminator_learning_rate = 1e-4
    config.autoencoder.lecam_weight = 0.001
    return config
