"""What the engine runs on a model."""

import math

import numpy as np
import pytest

from vqd_jax.web import form, work


@pytest.mark.parametrize(
    ("pause", "told"),
    [
        (math.inf, [5, 20]),
        pytest.param(0.0, [5, 10, 15, 20], marks=pytest.mark.slow),
    ],
)
def test_previews_come_now_and_then_and_the_picture_always(web_model, monkeypatch, pause, told):
    asked = form.parse({"prompt": "a", "num_images": 2, "num_steps": 20, "seed": 5}, web_model)
    decode, decoded = web_model._networks.pixels, []

    def counted(codes, *args):
        decoded.append(codes)
        return decode(codes, *args)

    monkeypatch.setattr(web_model._networks, "pixels", counted)
    monkeypatch.setattr(work, "PAUSE", pause)
    items = list(work.sampling(web_model, [asked]))
    assert len(items) == 5
    parts = [part for (part,) in filter(None, items)]
    assert [part.done for part in parts] == told
    assert [part.trajectory is None for part in parts] == [True] * (len(told) - 1) + [False]
    assert len(decoded) == len(parts)
    # Programs of different batches round a pixel between two levels to either of them.
    again = decode(parts[-1].tokens).astype(int)
    np.testing.assert_allclose(parts[-1].pixels.astype(int), again, atol=1)
