"""Tables in both directions, conversion of types, and every way in which a source can be wrong."""

import jax
import ml_dtypes
import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import tables
from vqd_jax.interop.tables import Row

ROWS = [
    Row("blocks.query.kernel", "layers.{i}.qkv.weight", "linear", (0, 2)),
    Row("blocks.key.kernel", "layers.{i}.qkv.weight", "linear", (1, 2)),
    Row("convs.0.kernel", "conv.weight", "conv"),
    Row("proj.kernel", "proj.weight", "linear_as_conv"),
    Row("norm.scale", "norm.weight"),
]
SHAPES = {
    "blocks": {"query": {"kernel": (2, 3, 4)}, "key": {"kernel": (2, 3, 4)}},
    "convs": {0: {"kernel": (3, 1, 5, 6)}},
    "proj": {"kernel": (1, 1, 2, 7)},
    "norm": {"scale": (4,)},
}
ABSTRACT = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def theirs():
    rng = np.random.default_rng(0)
    shapes = {
        "layers.0.qkv.weight": (8, 3),
        "layers.1.qkv.weight": (8, 3),
        "conv.weight": (6, 5, 3, 1),
        "proj.weight": (7, 2),
        "norm.weight": (4,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_layouts_and_packed_parts():
    source = theirs()
    params, used = tables.read(ROWS, source, ABSTRACT, "file.pth")
    assert used == set(source)
    assert jax.tree.map(np.shape, params) == SHAPES
    packed = source["layers.1.qkv.weight"]
    np.testing.assert_array_equal(params["blocks"]["query"]["kernel"][1], packed[:4].T)
    np.testing.assert_array_equal(params["blocks"]["key"]["kernel"][1], packed[4:].T)
    kernel = params["convs"][0]["kernel"]
    assert kernel[2, 0, 4, 1] == source["conv.weight"][1, 4, 2, 0]
    np.testing.assert_array_equal(params["proj"]["kernel"][0, 0], source["proj.weight"].T)


def test_writing_is_the_reverse_of_reading():
    source = theirs()
    written = tables.write(ROWS, tables.read(ROWS, source, ABSTRACT, "file.pth")[0])
    assert sorted(written) == sorted(source)
    for name, array in source.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_become_the_wanted_one(dtype):
    source = {name: array.astype(dtype) for name, array in theirs().items()}
    params, _ = tables.read(ROWS, source, ABSTRACT, "file.pth")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected = source["norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["norm"]["scale"], expected)


def test_a_missing_tensor_is_named_in_both_worlds():
    source = theirs()
    del source["layers.1.qkv.weight"]
    message = r"file.pth lacks 2 tensors: layers\.1\.qkv\.weight \(ours: blocks\.query\.kernel\)"
    with pytest.raises(UserError, match=message):
        tables.read(ROWS, source, ABSTRACT, "file.pth")


def test_another_shape_is_named_in_the_layout_of_the_source():
    source = theirs() | {"proj.weight": np.zeros((2, 7), np.float32)}
    message = r"proj\.weight \(ours: proj\.kernel\) is \(2, 7\) instead of \(7, 2\)"
    with pytest.raises(UserError, match=message):
        tables.read(ROWS, source, ABSTRACT, "file.pth")


@pytest.mark.parametrize(
    "value, dtype", [(np.nan, np.float32), (np.inf, np.float16), (1e300, np.float64)]
)
def test_values_that_are_not_finite_are_refused(value, dtype):
    source = theirs()
    source["norm.weight"] = np.array([0, 1, value, 2], dtype)
    with pytest.raises(UserError, match=r"norm\.weight \(ours: norm\.scale\) .* not finite"):
        tables.read(ROWS, source, ABSTRACT, "file.pth")


def test_a_table_that_does_not_fit_the_model_is_a_fault_of_ours():
    with pytest.raises(ValueError, match="norm.scale"):
        tables.read(ROWS[:-1], theirs(), ABSTRACT, "file.pth")


def test_left_over_tensors_are_named_unless_ignored():
    names = ["a", "loss.lpips.0", "b", "odd.key"]
    tables.require_all_used(names, {"a", "b"}, [r"loss\..*", r"odd\.key"], "file.pth")
    with pytest.raises(UserError, match=r"1 tensors .* no place for: odd\.key$"):
        tables.require_all_used(names, {"a", "b"}, [r"loss\..*", r"odd"], "file.pth")


def test_prefixes():
    assert tables.prefixed(ROWS[-1:], "net.", "model.") == [
        Row("net.norm.scale", "model.norm.weight")
    ]
    assert tables.under({"ema.a": 1, "model.a": 2}, "ema.") == {"a": 1}
