"""What a user asks for: words that are not known, seeds, codes."""

import numpy as np
import pytest

from vqd_jax import request
from vqd_jax.errors import UserError
from vqd_jax.pipeline import VQDiffusion


@pytest.mark.parametrize(
    ("method", "word", "advice"),
    [
        ("inpaint", "num_inference_steps", "did you mean num_steps"),
        ("generate", "num_images_per_prompt", "did you mean num_images"),
        ("generate", "guidence_scale", "did you mean guidance_scale"),
        ("generate", "generator", "did you mean seed"),
        ("edit", "strenght", "did you mean strength"),
        ("repaint", "truncation_rate", "did you mean truncation"),
        ("settings", "tempreature", "did you mean temperature"),
        ("generate", "zzz", "there are prompts, num_images, seed"),
    ],
)
def test_an_unknown_word_names_the_nearest(method, word, advice):
    # The words are checked before anything else of the model is touched.
    model = object.__new__(VQDiffusion)
    with pytest.raises(UserError, match=rf"^{method}\(\) has no option {word}; {advice}"):
        getattr(model, method)(**{word: 3})


def test_one_value_is_for_all_and_several_are_one_each():
    assert request.spread("seed", [1], 3) == [1, 1, 1]
    assert request.spread("seed", [1, 2], 2) == [1, 2]
    with pytest.raises(UserError, match="^seed: there are 2 for 3 pictures"):
        request.spread("seed", [1, 2], 3)


def test_seeds_have_32_bits():
    assert request.seeds(2**32 - 1, 2).tolist() == [2**32 - 1] * 2
    assert request.seeds(np.array([3, 4]), 2).dtype == np.uint32
    for wrong in (-1, 2**32, 0.5, "7"):
        with pytest.raises(UserError, match="^seed="):
            request.seeds(wrong, 1)


def test_codes_may_have_the_shapes_that_they_come_in():
    codes = np.arange(12)
    for shape in ((12,), (3, 4), (2, 6), (1, 2, 6), (2, 2, 3)):
        expected = codes.reshape(-1, 6)
        np.testing.assert_array_equal(
            request.token_codes("codes", codes.reshape(shape), 6, 11), expected
        )
        np.testing.assert_array_equal(
            request.token_marks(codes.reshape(shape) > 3, 6), expected > 3
        )
