"""What the engine runs on a model."""

import math

import numpy as np
import pytest

from vqd_jax.web import form, work


@pytest.mark.parametrize(("pause", "decodings"), [(math.inf, 2), (0.0, 4)])
def test_previews_are_decoded_now_and_then_and_the_picture_always(
    web_model, monkeypatch, pause, decodings
):
    asked = form.parse({"prompt": "a", "num_images": 2, "num_steps": 20, "seed": 5}, web_model)
    decode, decoded = web_model._networks.pixels, []

    def counted(codes, *args):
        decoded.append(codes)
        return decode(codes, *args)

    monkeypatch.setattr(web_model._networks, "pixels", counted)
    monkeypatch.setattr(work, "PAUSE", pause)
    parts = [part for (part,) in work.sampling(web_model, [asked])]
    assert len(decoded) == decodings
    assert [part.done for part in parts] == [5, 10, 15, 20, 20]
    assert (parts[0].pixels == parts[1].pixels).all() == (pause > 0)
    np.testing.assert_array_equal(parts[-1].pixels, decode(parts[-1].tokens))
