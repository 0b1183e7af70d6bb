"""Several regions in one image: FOCUS's choice, ZoomEye's two blocks, more of them, and the way back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxvqa.errors import UserError
from jaxvqa.images import CLIP_MEAN_COLOUR, ImageError, pad_to_square
from jaxvqa.regions.canvas import close_up, compose, highlight, paste

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


def picture(size, boxes):
    """A black image with each box in a colour of its own."""
    image = Image.new("RGB", size)
    for colour, box in zip(COLOURS, boxes, strict=False):
        image.paste(colour, box)
    return image


def corners(view):
    return [tuple(place[:2]) for place in view.places.tolist()]


def around(x, y, half=50):
    return (x - half, y - half, x + half, y + half)


# FOCUS, section 12, "Paste": centres, then where the left and the right block lie.
@pytest.mark.parametrize(
    ("left", "right", "y_left", "y_right"),
    [(500, 700, 68, 268), (500, 1000, 0, 336), (700, 500, 268, 68), (500, 500, 168, 168), (500, 601, 118, 218)],
)
def test_two_blocks_stand_as_far_apart_as_in_the_table(left, right, y_left, y_right):
    boxes = [around(100, left), around(1900, right)]
    for layout in ("relative", "columns"):
        view = paste(picture((2000, 1500), boxes), boxes, layout=layout)
        assert view.image.size == (672, 672)
        assert corners(view) == [(0, y_left), (336, y_right)]
        assert view.image.getpixel((168, y_left + 168)) == COLOURS[0]
        assert view.image.getpixel((504, y_right + 168)) == COLOURS[1]
        assert {view.image.getpixel(at) for at in ((0, y_left - 1), (335, y_left + 336)) if 0 <= at[1] < 672} <= {
            CLIP_MEAN_COLOUR
        }


def test_an_odd_distance_is_halved_downwards():
    """Integer division of a negative number, as in the release: 700 above 599 gives -101 // 2 = -51."""
    boxes = [around(100, 700), around(1900, 599)]
    assert corners(paste(picture((2000, 1500), boxes), boxes)) == [(0, 219), (336, 117)]


def test_the_better_box_may_be_the_right_one():
    boxes = [around(1900, 700), around(100, 500)]
    view = paste(picture((2000, 1500), boxes), boxes)
    assert corners(view) == [(336, 268), (0, 68)]
    assert view.image.getpixel((504, 436)) == COLOURS[0]


@pytest.mark.parametrize(("count", "block"), [(3, 168), (4, 168), (5, 112)])
def test_more_blocks_lie_as_their_boxes_do(count, block):
    boxes = [around(x, y, 20) for x, y in ((1000, 500), (20, 20), (1980, 980), (20, 980), (1980, 20))][:count]
    view = paste(picture((2000, 1000), boxes), boxes)
    assert {place[2] - place[0] for place in view.places.tolist()} == {block}
    # The union is the whole image: its centre falls on the centre, its corners are moved inside.
    expected = [((672 - block) // 2,) * 2, (0, 0), (672 - block,) * 2, (0, 672 - block), (672 - block, 0)]
    assert corners(view) == expected[:count]
    for place, colour in zip(view.places, COLOURS, strict=False):
        assert view.image.getpixel(tuple(((place[:2] + place[2:]) // 2).tolist())) == colour


def test_better_boxes_cover_worse_ones():
    boxes = [around(500, 500, 20), around(545, 500, 20), around(980, 980, 20)]
    view = paste(picture((1000, 1000), boxes), boxes)
    first, second, _ = view.places
    both = (second[:2] + first[2:]) // 2
    assert (second[:2] < both).all() and (both < first[2:]).all()
    assert view.image.getpixel(tuple(both.tolist())) == COLOURS[0]
    assert view.to_original(both) == pytest.approx(np.array(boxes[0][:2]) + (both - first[:2]) * 40 / 168)


def test_columns_go_from_left_to_right_each_as_high_as_its_centre():
    boxes = [around(900, 500), around(100, 400), around(500, 460)]
    view = paste(picture((1000, 1000), boxes), boxes, layout="columns")
    # Three columns of 224; the middle between the highest and the lowest centre is 450.
    assert corners(view) == [(448, 224 + 50), (0, 224 - 50), (224, 224 + 10)]
    far = [around(900, 950), around(100, 50), around(500, 500)]
    assert corners(paste(picture((1000, 1000), far), far, layout="columns")) == [(448, 448), (0, 0), (224, 224)]


def test_the_side_is_that_of_the_encoder():
    boxes = [around(100, 500), around(1900, 700)]
    view = paste(picture((2000, 1500), boxes), boxes, side=64)
    assert view.image.size == (128, 128) and corners(view) == [(0, 0), (64, 64)]


# What FOCUS shows.


def test_near_boxes_are_shown_in_the_crop_around_them():
    boxes = [(100, 100, 200, 200), (400, 250, 500, 300)]
    image = picture((2000, 1500), boxes)
    view = compose(image, boxes)
    assert view.sources.tolist() == [[100, 100, 500, 300]] and view.image.size == (400, 200)
    assert view.image.getpixel((350, 175)) == COLOURS[1]
    assert view.to_original(np.array([350, 175])).tolist() == [450, 275]


def test_one_box_is_its_crop_and_none_is_the_whole_image():
    image = picture((300, 200), [])
    assert compose(image, [(10, 20, 30, 60)]).image.size == (20, 40)
    assert compose(image, []).image.size == (300, 200)
    assert compose(image, np.zeros((0, 4))).sources.tolist() == [[0, 0, 300, 200]]


def test_the_limit_is_the_distance_of_two_centres():
    """Centres 900 and 800 pixels apart along the axes: sqrt(1.45e6) = 1204; 900 and 790: 1197.5."""
    image = picture((2000, 1500), [])
    assert compose(image, [around(100, 100), around(1000, 900)]).image.size == (672, 672)
    assert compose(image, [around(100, 100), around(1000, 890)]).image.size == (1000, 890)
    assert compose(image, [around(100, 100), around(1300, 100)]).image.size == (1300, 100)
    assert compose(image, [around(100, 100), around(200, 100)], far=99).image.size == (672, 672)
    near_and_far = [around(100, 100), around(150, 100), around(1400, 1400)]
    assert compose(image, near_and_far, layout="columns").places.shape == (3, 4)


def test_boxes_are_rounded_and_cut_to_the_image_and_empty_ones_refused():
    image = picture((300, 200), [])
    assert compose(image, [(-5.5, 10.4, 20.6, 500)]).sources.tolist() == [[0, 10, 21, 200]]
    with pytest.raises(ImageError, match="holds no pixel"):
        compose(image, [(10, 10, 10, 20)])
    with pytest.raises(ImageError, match="holds no pixel"):
        compose(image, [(20, 20, 10, 10)])
    with pytest.raises(ImageError, match="holds no pixel"):
        paste(image, [(0, 0, 10, 10), (400, 0, 500, 100)])
    with pytest.raises(UserError, match="expected at least one"):
        paste(image, [])
    with pytest.raises(UserError, match="expected relative or columns"):
        paste(image, [(0, 0, 10, 10)], layout="rows")


box = st.tuples(*[st.integers(0, 380)] * 2, *[st.integers(1, 120)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(st.lists(box, min_size=1, max_size=7), st.sampled_from(["relative", "columns"]))
def test_every_block_lies_on_the_canvas_and_leads_back_into_its_box(boxes, layout):
    view = paste(picture((500, 500), []), boxes, side=28, layout=layout)
    assert (view.places >= 0).all() and (view.places <= 56).all()
    assert (view.sources == boxes).all()
    y, x = np.mgrid[:56, :56] + 0.5
    back = view.to_original(np.stack([x, y], -1))
    canvas = np.asarray(view.image)
    # Where nothing was pasted there is the mean colour, and nowhere to go back to.
    lost = np.isnan(back).any(-1)
    assert (canvas[lost] == CLIP_MEAN_COLOUR).all() and (canvas[~lost] == 0).all()
    inside = [(back[~lost] >= b[:2]).all(-1) & (back[~lost] < b[2:]).all(-1) for b in map(np.array, boxes)]
    assert np.any(inside, axis=0).all()


def test_a_very_wide_image_is_pasted_too():
    boxes = [(0, 0, 20, 10), (5900, 0, 6000, 10)]
    assert corners(compose(picture((6000, 10), boxes), boxes)) == [(0, 168), (336, 168)]


# Close-ups.


def test_a_close_up_shows_at_least_the_encoders_side_of_the_padded_square():
    image = picture((1000, 600), [(490, 290, 510, 310)])
    close = close_up(image, (490, 290, 510, 310), 336)
    assert close.size == (336, 336)
    # The centre (500, 300) lies at (500, 500) of the square.
    assert close == pad_to_square(image).crop((332, 332, 668, 668))
    assert close_up(image, (490, 290, 510, 310), 336, 1.2).size == (403, 403)
    assert close_up(image, (100, 100, 600.5, 500), 336) == pad_to_square(image).crop((100, 300, 601, 700))


def test_a_close_up_is_moved_in_on_the_left_and_cut_on_the_right():
    image = picture((1000, 1000), [])
    assert close_up(image, (0, 0, 20, 20), 336).size == (336, 336)
    assert close_up(image, (980, 490, 1000, 510), 336).size == (178, 336)
    assert close_up(picture((50, 30), []), (0, 0, 10, 10), 336).size == (50, 50)


# Outlines.


def test_an_outline_lies_outside_its_box_and_hides_nothing_in_it():
    """240 pixels wide: a line of 2."""
    image = picture((240, 100), [(10, 20, 30, 60)])
    shown = highlight(image, [(10, 20, 30, 60)])
    expected = np.zeros((100, 240, 3), np.uint8)
    expected[18:62, 8:32] = (255, 0, 0)
    np.testing.assert_array_equal(np.asarray(shown), expected)
    assert image.getpixel((9, 30)) == (0, 0, 0), "the image itself is left as it is"
    inside = highlight(image, [(10, 20, 30, 60)], "blue")
    assert inside.getpixel((8, 18)) == inside.getpixel((31, 61)) == (0, 0, 255)
    assert inside.getpixel((10, 20)) == inside.getpixel((29, 59)) == COLOURS[0]
    assert inside.getpixel((7, 30)) == inside.getpixel((32, 30)) == (0, 0, 0)


def test_at_the_border_an_outline_moves_into_its_box():
    shown = highlight(picture((240, 100), []), [(0, 0, 240, 100), (100, 99.4, 120, 200)])
    assert shown.getpixel((0, 50)) == shown.getpixel((239, 98)) == (255, 0, 0)
    assert shown.getpixel((2, 50)) == (0, 0, 0)
    assert highlight(picture((20, 20), []), [(5, 5, 10, 10)]).getpixel((4, 4)) == (255, 0, 0), "at least a pixel wide"
