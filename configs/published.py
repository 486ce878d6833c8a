"""The published sizes that several configs share: image tokenizers, text encoder, denoisers.

Sizes and training settings are those of VQ-Diffusion (arXiv:2111.14822) and Improved VQ-Diffusion
(arXiv:2205.16007). docs/weights.md lists the released files and their settings.
"""

from vqd_jax.config import default_config

# The published code updates its averages every 25 steps, with a decay of 0.99.
EMA_DECAY = 0.99 ** (1 / 25)


def base():
    """The settings that all published runs share."""
    config = default_config()
    config.data.image_size = 256
    config.data.random_crop = True
    config.autoencoder.norm_groups = 32
    config.autoencoder.num_res_blocks = 2
    config.autoencoder.latent_channels = 256
    config.autoencoder.codebook_dim = 256
    config.denoiser.num_heads = 16
    config.denoiser.dtype = "bfloat16"
    config.denoiser.remat = "dots"
    config.training.batch_size = 32
    config.training.warmup_steps = 1000
    config.training.clip_norm = 0.5
    config.training.ema_decay = EMA_DECAY
    config.training.null_text_rate = 0.1
    config.training.log_every = 100
    config.training.eval_every = 10_000
    config.training.save_every = 2_000
    config.sampling.guidance_scale = 3.0
    config.sampling.truncation = 1.0
    return config


def clip_text(config):
    """The text encoder of CLIP ViT-B/32. ``text_encoder.path`` must name a converted one."""
    config.text_encoder.width = 512
    config.text_encoder.num_layers = 12
    config.text_encoder.num_heads = 8
    config.text_encoder.normalize = True


def openimages_f8(config):
    """The Gumbel tokenizer of OpenImages: 32x32 codes. The models use 2887 of its 8192 entries."""
    config.autoencoder.channels = 128
    config.autoencoder.channel_multipliers = (1, 1, 2, 4)
    config.autoencoder.attention_resolutions = (32,)
    config.autoencoder.quantizer = "gumbel"
    config.autoencoder.codebook_size = 8192
    config.autoencoder.num_codes = 2887


def f16(config):
    """What the tokenizers of ImageNet and FFHQ share, 16x16 codes, and what goes with them."""
    config.autoencoder.channels = 128
    config.autoencoder.channel_multipliers = (1, 1, 2, 2, 4)
    config.autoencoder.attention_resolutions = (16,)
    # The published table has 32x32 positions and is cut (see ``DenoiserConfig``).
    config.denoiser.position_table = (32, 32)
    config.denoiser.width = 512
    config.denoiser.mlp = "conv"
    config.training.auxiliary_weight = 1e-3


def vqgan(config):
    """How published VQGANs were trained (the loss and the optimizer of taming-transformers).

    The learning rate is 4.5e-6 for every picture of a batch, and stays; their batches were of 3 to
    12 pictures a device. Their perceptual distance is that of VGG16, whose file the user has:
    --config.autoencoder.perceptual=vgg16 --config.autoencoder.perceptual_path=FILE. Without it,
    SqueezeNet sees. Computation in bfloat16, and every block again in the backward pass, are ours.
    """
    config.autoencoder.batch_size = 24
    config.autoencoder.num_steps = 500_000
    config.autoencoder.learning_rate = 4.5e-6 * 24
    config.autoencoder.discriminator_learning_rate = 4.5e-6 * 24
    config.autoencoder.final_learning_rate = 1.0
    config.autoencoder.warmup_steps = 0
    config.autoencoder.adam_b1 = 0.5
    config.autoencoder.adam_b2 = 0.9
    config.autoencoder.clip_norm = 1e9
    # Their 0.25 is the weight of the codebook's own term.
    config.autoencoder.commitment = 1.0
    config.autoencoder.squared_weight = 0.0
    config.autoencoder.perceptual_weight = 1.0
    config.autoencoder.adversarial_weight = 0.8
    config.autoencoder.adaptive_weight = True
    config.autoencoder.discriminator = "patchgan"
    config.autoencoder.dtype = "bfloat16"
    config.autoencoder.remat = "full"


def text_base():
    """VQ-Diffusion-B and -F: 389 M parameters in the denoiser."""
    config = base()
    clip_text(config)
    openimages_f8(config)
    config.denoiser.width = 1024
    config.denoiser.num_layers = 19
    config.denoiser.learned_null = True
    return config


def text_small():
    """VQ-Diffusion-S: 36 M parameters in the denoiser."""
    config = text_base()
    config.denoiser.width = 192
    config.denoiser.num_layers = 18
    config.denoiser.mlp = "conv"
    config.denoiser.mlp_ratio = 2
    config.denoiser.remat = "none"
    return config
