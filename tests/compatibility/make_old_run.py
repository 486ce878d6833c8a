"""Makes ``run_3c677fe.tar.xz`` beside this file, with the code of commit 3c677fe.

git worktree add /tmp/old 3c677fe
cd tests && PYTHONPATH=/tmp/old python compatibility/make_old_run.py
"""

import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from vqd_jax import data_tasks
from vqd_jax.config import default_config, validate
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import stage_two

HERE = Path(__file__).resolve().parent


def get_config():
    """A class-conditional model of 16 tokens, as small as it can be."""
    config = default_config()
    config.data.name, config.data.dir, config.data.prepared_dir = "imagenet_class", "files", "made"
    config.data.image_size = 8
    config.autoencoder.channels = 4
    config.autoencoder.norm_groups = 2
    config.autoencoder.channel_multipliers = (1, 2)
    config.autoencoder.latent_channels = 4
    config.autoencoder.codebook_dim = 4
    config.autoencoder.num_codes = 8
    config.autoencoder.num_steps = 3
    config.autoencoder.warmup_steps = 1
    config.autoencoder.batch_size = 4
    config.denoiser.condition = "class"
    config.denoiser.num_classes = 1000
    config.denoiser.learned_null = True
    config.denoiser.width = 8
    config.denoiser.num_layers = 1
    config.denoiser.num_heads = 2
    config.diffusion.num_steps = 5
    config.training.num_steps = 4
    config.training.batch_size = 4
    config.training.warmup_steps = 1
    config.training.log_every = 1
    config.training.eval_every = 4
    config.training.keep_checkpoints = 1
    config.evaluation.num_images = 2
    config.evaluation.num_draws = 2
    config.sampling.prompts = ("3",)
    config.sampling.images_per_prompt = 1
    return config


def main():
    """Trains, encodes, saves and draws in a scratch folder, and packs what is kept."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        shutil.copytree(HERE.parent / "data" / "layouts" / "imagenet", "files")
        stage_two.train(get_config(), "run")
        model = VQDiffusion.from_workdir("run")
        model.save_pretrained("model")
        drawn = {}
        for rule in ("purity", "ordinary"):
            made = model.generate([3, 999], num_images=2, seed=1, rule=rule)
            drawn |= {f"{rule}_codes": made.codes, f"{rule}_pixels": made.pixels}
        np.savez_compressed("drawn.npz", **drawn)
        # Codes and token ids of captions, from the same autoencoder.
        shutil.rmtree("files")
        shutil.copytree(HERE.parent / "data" / "layouts" / "jsonl", "files")
        config = get_config()
        config.data.name, config.data.prepared_dir = "image_text_folder", "captioned"
        config.denoiser.condition, config.denoiser.num_classes = "text", 0
        config.text_encoder.context_length = 8
        config.autoencoder.path = "run"
        validate(config)
        data_tasks.encode(config, "captions")
        for path in ("model/tokenizer", "run/autoencoder/checkpoints", "captions/autoencoder"):
            shutil.rmtree(path)
        unwanted = re.compile(r"tensorboard|samples|reconstructions|\.lock")
        with tarfile.open(HERE / "run_3c677fe.tar.xz", "w:xz") as archive:
            for name in ("run", "model", "drawn.npz", "made", "captions"):
                archive.add(
                    name, filter=lambda entry: None if unwanted.search(entry.name) else entry
                )


if __name__ == "__main__":
    main()
