"""A student of few steps, from a trained model that draws pictures in many.

python -m vqd_jax.main --mode=distil --model=MODEL --config=configs/distil.py --workdir=DIR

The network, the tokenizer and the noise are those of MODEL. ``--num_steps``, ``--guidance_scale``
and ``--truncation`` say how the teacher draws, ``config.distil.num_steps`` for how many steps the
student is made. ``config.distil.moment_weight`` above 0 lets MODEL judge what the student draws;
0.5 was tried, with a student of pairs in ``config.training.init_from``. docs/distillation.md says
which teachers have something to teach.
"""

from vqd_jax.config import default_config


def get_config():
    config = default_config()
    config.distil.num_steps = 4
    config.distil.num_pairs = 10_000
    config.training.num_steps = 1000
    config.training.learning_rate = 5e-4
    config.training.warmup_steps = 50
    config.training.ema_decay = 0.99
    config.training.eval_every = 500
    config.sampling.prompts = ("",)
    config.sampling.images_per_prompt = 8
    return config
