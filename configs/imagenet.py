"""Class-conditional VQ-Diffusion on ImageNet, 256x256 pixels: 518 M parameters.

python -m vqd_jax.main --config=configs/imagenet.py --workdir=DIR --config.data.dir=IMAGENET \
    --config.autoencoder.path=MODELS/imagenet_f16

The null class is learned. --config.denoiser.learned_null=False gives the first published model,
whose null class is the mean of all classes. Published: FID 11.89, and 4.83 with guidance. This
config has not been run yet.
"""

from configs import published


def get_config():
    config = published.base()
    published.f16(config)
    config.data.name = "imagenet_class"
    config.autoencoder.codebook_size = 16384
    config.autoencoder.num_codes = 974
    config.denoiser.condition = "class"
    config.denoiser.num_classes = 1000
    config.denoiser.learned_null = True
    config.denoiser.num_layers = 24
    config.training.learning_rate = 4.5e-4
    config.training.warmup_steps = 5000
    config.training.batch_size = 256
    # 100 passes over 1,281,167 pictures.
    config.training.num_steps = 500_000
    config.sampling.guidance_scale = 1.5
    config.sampling.truncation = 0.94
    config.sampling.prompts = ("207", "388", "933", "")
    return config
