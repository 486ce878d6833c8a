import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import folder

PARAMS = {"a": {0: {"kernel": np.arange(6.0).reshape(2, 3).astype(np.float32)}}, "b": np.ones(2)}


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
        ({"a": PARAMS["a"]}, "has a tensor that the model lacks: b"),
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
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        folder.load_params(tmp_path / "m", PARAMS)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a model folder"):
        folder.load_config(tmp_path)
