import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import folder, tensors

PARAMS = {
    "a": {0: {"kernel": np.arange(6.0).reshape(2, 3).astype(np.float32)}},
    "b": np.ones(2),
    "scalar": np.float32(0.5),
}


def test_what_is_saved_comes_back(tmp_path):
    folder.save(tmp_path / "m", {"x": [1, 2]}, PARAMS)
    assert folder.load_config(tmp_path / "m") == {"x": [1, 2]}
    back = folder.load_params(tmp_path / "m", PARAMS)
    np.testing.assert_array_equal(back["a"][0]["kernel"], PARAMS["a"][0]["kernel"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        folder.save(tmp_path / "m", {"x": object()}, PARAMS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({k: v for k, v in PARAMS.items() if k != "b"}, "has a tensor that the model lacks: b"),
        (PARAMS | {"c": np.ones(1)}, "lacks the tensor c"),
        (PARAMS | {"b": np.ones(3)}, r"b is \(2,\), the config asks for \(3,\)"),
    ],
)
def test_tensors_must_match_on_both_sides(tmp_path, change, message):
    folder.save(tmp_path / "m", {}, PARAMS)
    with pytest.raises(UserError, match=message):
        folder.load_params(tmp_path / "m", change)


def test_values_that_are_not_finite_are_refused(tmp_path):
    folder.save(tmp_path / "m", {}, PARAMS | {"b": np.array([1.0, np.nan])})
    with pytest.raises(UserError, match="b has values that are not finite"):
        folder.load_params(tmp_path / "m", PARAMS)


def test_a_file_cut_short_is_named(tmp_path):
    folder.save(tmp_path / "m", {}, PARAMS)
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"model\.safetensors is cut short"):
        folder.load_params(tmp_path / "m", PARAMS)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a model folder"):
        folder.load_config(tmp_path)


def test_large_models_are_spread_over_files_with_an_index(tmp_path):
    arrays = {f"x{i}": np.full(10, i, np.float32) for i in range(5)}
    folder.write_shards(tmp_path, "model", arrays, max_bytes=80)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    back = folder.load_params(tmp_path, arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is not a file"):
        folder.load_params(tmp_path, arrays)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="leads out of the folder"):
        folder.read_shards(tmp_path, "model")


def test_bfloat16_halves_the_file_and_integers_stay(tmp_path):
    params = {
        "w": np.linspace(0, 1, 1000, dtype=np.float32),
        "map": np.arange(1000, dtype=np.int32),
    }
    folder.save(tmp_path / "m", {}, params, dtype="bfloat16", files={"tokenizer/a.txt": "x"})
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 1000 * (2 + 4) + 400
    assert (tmp_path / "m" / "tokenizer" / "a.txt").read_text() == "x"
    back = folder.load_params(tmp_path / "m", params)
    assert back["w"].dtype == np.float32
    np.testing.assert_allclose(back["w"], params["w"], rtol=2**-8)
    np.testing.assert_array_equal(back["map"], params["map"])


def test_what_is_no_model_is_not_replaced(tmp_path):
    target = tmp_path / "run"
    folder.save(target, {"kind": "x"}, {"a": np.zeros(2, np.float32)})
    folder.save(target, {"kind": "y"}, {"a": np.ones(2, np.float32)})
    assert folder.load_config(target)["kind"] == "y"
    (target / "checkpoints").mkdir()
    thesis = tmp_path / "mine"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years")
    for other, name in ((target, "checkpoints"), (thesis, "thesis.txt")):
        with pytest.raises(UserError, match=f"other things than a model .{name}"):
            folder.save(other, {}, {"a": np.zeros(2, np.float32)})
        assert (other / name).exists()
    with pytest.raises(UserError, match="is a file"):
        folder.save(thesis / "thesis.txt", {}, {})


def test_a_variant_in_half_precision_is_taken_where_it_is_alone(tmp_path):
    array = np.linspace(0, 1, 10, dtype=np.float32)
    half = {"w": array.astype(np.float16)}
    tensors.write_safetensors(tmp_path / "model.fp16.safetensors", half, {"w": np.float16})
    found = folder.read_weights(tmp_path, "model", "model.bin")["w"].read(np.float32)
    np.testing.assert_array_equal(found, half["w"].astype(np.float32))
    # Whole precision comes first.
    folder.write_shards(tmp_path, "model", {"w": array})
    found = folder.read_weights(tmp_path, "model", "model.bin")["w"].read(np.float32)
    np.testing.assert_array_equal(found, array)
    with pytest.raises(UserError, match="has neither vae.safetensors nor vae.bin"):
        folder.read_weights(tmp_path, "vae", "vae.bin")
