"""Requests of visitors: what is let through, and what is said of the rest."""

import dataclasses
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.web import form, wire

KNOWN = wire.pack(np.arange(16) * 2 + 2)


def test_what_is_missing_is_the_models_own(web_model):
    c = web_model.config.sampling
    made = form.parse({}, web_model)
    assert (made.rule, made.num_steps) == (c.rule, 100)
    assert made.guidance_scale == c.guidance_scale and made.truncation == c.truncation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bogus": 1}, "'bogus': there is no such field"),
        ({"prompt": 5}, "prompt: must be a text"),
        ({"prompt": "x" * 501}, "prompt: is longer than 500 characters"),
        ({"seed": True}, "seed: must be a whole number"),
        ({"seed": 1.5}, "seed: must be a whole number"),
        ({"seed": -1}, "seed: must lie in 0..4294967295"),
        ({"num_images": 17}, r"num_images: must lie in 1\.\.16"),
        ({"num_steps": 1001}, r"num_steps: must lie in 1\.\.1000"),
        ({"truncation": float("nan")}, "truncation: must be a number"),
        ({"truncation": -1.0}, "truncation"),
        ({"temperature": 0}, "temperature"),
        ({"rule": "luck"}, "rule='luck'"),
        ({"guidance_scale": 1, "negative_prompt": "a"}, "negative_prompt: needs a guidance_scale"),
        ({"known": "?"}, "known: is no list of codes"),
        ({"known": KNOWN[:-3]}, "known: must be 16 numbers below 33"),
        ({"known": wire.pack(np.full(16, 33))}, "known: must be 16 numbers below 33"),
        ({"initial": wire.pack(np.full(16, 32))}, "initial: must be 16 numbers below 32"),
        ({"initial": wire.pack(np.arange(16)), "strength": 2.0}, "strength"),
    ],
)
def test_what_is_wrong_is_named(web_model, fields, message):
    with pytest.raises(UserError, match=message):
        form.parse(fields, web_model)


def test_the_query_of_a_link_says_the_same(web_model):
    fields = {"prompt": "a & b = c", "seed": 2**32 - 1, "guidance_scale": 2.5, "known": KNOWN}
    made = form.parse(fields, web_model)
    query = urlencode({name: value for name, value in made.fields().items() if value != ""})
    assert form.parse(dict(parse_qsl(query)), web_model, texts=True) == made
    with pytest.raises(UserError, match="seed: must be a whole number"):
        form.parse({"seed": "1"}, web_model)


def test_codes_become_options(web_model):
    made = form.parse({"initial": wire.pack(np.arange(16)), "strength": 0.25}, web_model)
    options = form.options(made, web_model)
    np.testing.assert_array_equal(options["initial"], np.arange(16))
    assert options["strength"] == 0.25 and "known" not in options
    assert "strength" not in form.options(dataclasses.replace(made, initial=""), web_model)
