"""VQ-Diffusion-Large (1.36 billion parameters, random weights) in diffusers and here: one answer.

python -m pytest -m slow tests/interop/test_full_size.py

Needs diffusers and transformers (extra "convert"), 9 GB of memory and 6 GB of disk: the two sides
run one after the other, each in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PROMPTS = ["teddy bear playing in the pool", "a city skyline at night"]
TIMES = [1, 60]


def run_ours(folder):
    """Makes the model, writes it for diffusers and keeps its answers."""
    import jax
    import jax.numpy as jnp

    from configs import ithq
    from vqd_jax import config as config_lib
    from vqd_jax.models import autoencoder, conditioned
    from vqd_jax.pipeline import VQDiffusion

    config = ithq.get_config()
    config.denoiser.dtype, config.denoiser.remat = "float32", "none"
    config.denoiser.product_dtype = "float32"
    rng, key = np.random.default_rng(0), jax.random.key(0)

    def draw(path, leaf):
        array = rng.standard_normal(leaf.shape, np.float32)
        array *= 0.02
        if path[-1].key == "scale":
            array += 1
        # On the device one by one: two copies of all would be 12 GB.
        return jnp.asarray(array)

    def parameters(init, sizes):
        return jax.tree.map_with_path(draw, jax.eval_shape(lambda: init(sizes, key)))

    params = parameters(conditioned.init_params, config_lib.model_config(config))
    codec = parameters(autoencoder.init_params, config_lib.autoencoder_config(config))
    model = VQDiffusion(config, params, codec)
    sizes = [x.size for x in jax.tree.leaves(params["denoiser"])]
    model.save_pretrained(str(folder / "pipeline"), format="diffusers")
    answers = {"parameters": sum(sizes), "features": model.encode_text(PROMPTS)}
    tokens, codes = rng.integers(0, 4097, (2, 1024)), rng.integers(0, 4096, (1, 1024))
    for row, time in enumerate(TIMES):
        rows = slice(row, row + 1)
        answers[f"log_x0_{time}"] = model.predict_log_x0(
            tokens[rows], answers["features"][rows], np.array([time])
        )
    np.savez(
        folder / "ours.npz", **answers, tokens=tokens, codes=codes, pixels=model.decode_codes(codes)
    )


def run_diffusers(folder):
    """The same questions, put to diffusers."""
    import diffusers
    import torch
    from diffusers.pipelines.deprecated.vq_diffusion import pipeline_vq_diffusion

    # The index of a pipeline can name only what the library's front page has.
    name = "LearnedClassifierFreeSamplingEmbeddings"
    setattr(diffusers, name, getattr(pipeline_vq_diffusion, name))
    pipeline = diffusers.VQDiffusionPipeline.from_pretrained(str(folder / "pipeline"))
    asked = np.load(folder / "ours.npz")
    answers = {}
    with torch.no_grad():
        features = pipeline._encode_prompt(PROMPTS, 1, do_classifier_free_guidance=False)
        answers["features"] = features.numpy()
        for row, time in enumerate(TIMES):
            log_x0 = pipeline.transformer(
                torch.from_numpy(asked["tokens"][row : row + 1]),
                encoder_hidden_states=features[row : row + 1],
                timestep=torch.tensor(time - 1),
            ).sample
            answers[f"log_x0_{time}"] = log_x0.numpy().transpose(0, 2, 1)
        embedded = pipeline.vqvae.quantize.get_codebook_entry(
            torch.from_numpy(asked["codes"]), shape=(1, 32, 32, 128)
        )
        image = pipeline.vqvae.decode(embedded, force_not_quantize=True).sample
    answers["pixels"] = 255 * (image / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    np.savez(folder / "diffusers.npz", **answers)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{"ours": ..., "diffusers": ...}: what the two sides said."""
    if not importlib.util.find_spec("diffusers"):
        pytest.skip("diffusers comes with the extra 'convert'")
    folder = tmp_path_factory.mktemp("full_size")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": _with_root()}
    for side in ("ours", "diffusers"):
        command = [sys.executable, __file__, side, str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
    found = {side: dict(np.load(folder / f"{side}.npz")) for side in ("ours", "diffusers")}
    for file in (folder / "pipeline").rglob("*.safetensors"):
        file.unlink()
    return found


def _with_root():
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.mark.slow
def test_it_has_the_published_number_of_parameters(answers):
    assert answers["ours"]["parameters"] == 1_359_274_624


@pytest.mark.slow
def test_texts_have_the_same_features(answers):
    ours, theirs = answers["ours"]["features"], answers["diffusers"]["features"]
    print(f"features: largest difference {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("time", TIMES)
def test_logits_agree_to_a_thousandth(answers, time):
    ours, theirs = (answers[side][f"log_x0_{time}"] for side in ("ours", "diffusers"))
    spread, error = theirs.std(), np.abs(ours - theirs).max()
    print(f"time {time}: largest difference {error:.1e}, spread of the logits {spread:.2f}")
    assert spread > 0.1
    # Log-probabilities have a common offset; the differences between codes are what counts.
    assert error < 1e-3 * spread


@pytest.mark.slow
def test_pictures_agree_to_one_level(answers):
    ours, theirs = answers["ours"]["pixels"].astype(float), answers["diffusers"]["pixels"]
    print(f"pixels: largest difference {np.abs(ours - theirs).max():.2f} of 255, ours rounded")
    assert theirs.std() > 1
    assert np.abs(ours - theirs).max() <= 1


if __name__ == "__main__":
    {"ours": run_ours, "diffusers": run_diffusers}[sys.argv[1]](Path(sys.argv[2]))
