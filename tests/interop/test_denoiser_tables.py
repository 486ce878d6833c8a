"""Logits of the published denoisers, from files in the released layout."""

import collections
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from vqd_jax.errors import UserError
from vqd_jax.interop import denoiser_tables as keys
from vqd_jax.interop import tables, torch_file
from vqd_jax.models.denoiser import Denoiser

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PREFIX = "transformer.transformer."


def load(name, weights):
    """Names and tensors of a denoiser, the published way: averages laid over the others."""
    file = torch_file.load(GOLDEN / f"{name}.pth")
    tensors = tables.under(file["model"], PREFIX)
    if weights == "ema":
        tensors |= tables.under(file["ema"], "transformer.")
    return tensors


def build(name, weights="ema"):
    golden = np.load(GOLDEN / f"{name}.npz")
    tensors = load(name, weights)
    config = keys.published_config(
        tensors,
        num_heads=int(golden["cfg_net_heads"]),
        image_grid=int(golden["cfg_codec_grid"]),
        null_label=1000,
        learned_null=False,
        source=name,
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0))))
    rows = keys.published_rows(config)
    params, used = tables.read(rows, tensors, keys.abstract_params(config), name)
    tables.require_all_used(tensors, used, keys.IGNORED, name)
    return nnx.merge(graphdef, params), golden, tensors, rows, params


def class_last(array):
    return array.transpose(0, 2, 1)


@pytest.mark.parametrize(("weights", "logits"), [("ema", "logits"), ("raw", "logits_without_ema")])
def test_text_model(weights, logits):
    model, golden, *_ = build("text_model", weights)
    ours = model(golden["tokens"], golden["t"] + 1, golden["clip_features"])
    np.testing.assert_allclose(ours, class_last(golden[logits]), atol=1e-4)


def test_text_model_with_the_null_embedding():
    model, golden, *_ = build("text_model")
    null = np.broadcast_to(golden["null_embed"], golden["clip_features"].shape)
    ours = model(golden["tokens"], golden["t"] + 1, null)
    np.testing.assert_allclose(ours, class_last(golden["logits_null"]), atol=1e-4)


@pytest.mark.parametrize(("weights", "logits"), [("ema", "logits"), ("raw", "logits_without_ema")])
def test_class_model(weights, logits):
    model, golden, *_ = build("class_model", weights)
    assert model.config.position_table == tuple(golden["cfg_net_spatial"])
    ours = model(golden["tokens"], golden["t"] + 1, golden["labels"])
    np.testing.assert_allclose(ours, class_last(golden[logits]), atol=1e-4)


def test_a_label_past_the_table_is_its_mean():
    model, golden, *_ = build("class_model")
    ours = model(golden["tokens"], golden["t"] + 1, golden["labels_null"])
    np.testing.assert_allclose(ours, class_last(golden["logits_null"]), atol=1e-4)
    # The published code lets the first label decide for the whole batch; here each does for itself.
    mixed = model(golden["tokens"], golden["t"] + 1, golden["labels_mixed"])
    null = golden["labels_mixed"] >= model.config.num_classes
    assert null[0]
    assert not null[1:].any()
    np.testing.assert_allclose(mixed[:1], class_last(golden["logits_mixed"])[:1], atol=1e-4)


@pytest.mark.parametrize(("weights", "logits"), [("ema", "logits"), ("raw", "logits_without_ema")])
def test_unconditional_model(weights, logits):
    model, golden, *_ = build("uncond_model", weights)
    ours = model(golden["tokens"], golden["t"] + 1)
    np.testing.assert_allclose(ours, class_last(golden[logits]), atol=1e-4)


@pytest.mark.parametrize("name", ["text_model", "class_model", "uncond_model"])
def test_what_is_written_is_what_was_read(name):
    _, _, tensors, rows, params = build(name)
    written = tables.write(rows, params)
    kept = {n for n in tensors if not n.endswith("attn2.mask")}
    assert set(written) == kept
    for n in kept:
        np.testing.assert_array_equal(written[n], np.asarray(tensors[n]), err_msg=n)


def test_every_name_is_one_row_only():
    _, _, _, rows, _ = build("text_model")
    counts = collections.Counter(row.theirs for row in rows)
    assert max(counts.values()) == 1


def test_a_file_without_a_denoiser_is_named():
    with pytest.raises(UserError, match=r"x\.pth has no denoiser .*lacks to_logits"):
        keys.published_config(
            {}, num_heads=1, image_grid=4, null_label=1000, learned_null=False, source="x.pth"
        )
