"""Pictures of any size -> squares: what the reference vectors do not hold."""

import numpy as np
import pytest
from PIL import Image

from tests.made import draw_pictures
from udiff.data.squares import MAX_RATIO, bicubic


@pytest.mark.parametrize("turned", [False, True])
def test_the_ends_of_a_strip_do_not_matter(turned):
    """The middle of a strip of 4 x 200,000 pixels, whose whole would be 25.6 million wide."""
    middle = draw_pictures(1, 4 * MAX_RATIO, seed=1)[0][:4]
    strip = np.zeros((4, 200_000, 3), np.uint8)
    left = (200_000 - middle.shape[1]) // 2
    strip[:, left : left + middle.shape[1]] = middle
    squares = [
        bicubic(Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels), 512)
        for pixels in (middle, strip)
    ]
    assert squares[0].shape == (512, 512, 3)
    assert np.array_equal(*squares)
