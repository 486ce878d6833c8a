"""Your own style in a quarter of an hour: the packaged model goes on with some hundred pictures.

python -m vqd_jax.main --config=configs/finetune.py --config.data.dir=PICTURES --workdir=DIR

PICTURES has captions beside the pictures, as docs/data_sets.md describes. The tokenizer stays as it
is. These steps learn some hundred pictures by heart and forget others: docs/finetuning.md has an
example with its figures, and says when to stop.
"""

from configs import emoji_box


def get_config():
    config = emoji_box.get_config()
    config.data.name = "image_text_folder"
    config.data.balance_by = ""
    config.data.hold_out = ()
    config.autoencoder.path = "emoji"
    config.training.init_from = "emoji"
    config.training.num_steps = 600
    config.training.learning_rate = 5e-4
    config.training.warmup_steps = 20
    config.training.ema_decay = 0.99
    config.training.eval_every = 100
    config.training.save_every = 100
    config.evaluation.num_images = 48
    return config
