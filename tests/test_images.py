"""What may be opened as an image, what it becomes, and what is refused with which message."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxvqa import images
from jaxvqa.images import ImageError, crop, open_image, overlay, pad_to_square, pixel_box

GRADIENT = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source, **options):
    return np.asarray(open_image(source, **options))


def test_path_string_bytes_pil_image_and_array_give_the_same_pixels(tmp_path):
    image = Image.fromarray(GRADIENT)
    path = tmp_path / "gradient.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), image, GRADIENT):
        assert np.array_equal(pixels(source), GRADIENT)


@pytest.mark.parametrize("source", [5, None, [GRADIENT], 1.5])
def test_what_is_no_image_at_all_is_refused(source):
    with pytest.raises(ImageError, match=f"cannot be a {type(source).__name__}; expected a path"):
        open_image(source)


def test_a_missing_file_is_named():
    with pytest.raises(ImageError, match=r"nowhere\.png: no such image file"):
        open_image("nowhere.png")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ImageError, match="no such image file"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    "content", [b"this is a text file, not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_a_file_that_is_not_a_raster_image_is_refused(tmp_path, content):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"notes\.png: not an image"):
        open_image(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    with pytest.raises(ImageError, match=r"empty\.jpg: the file is empty"):
        open_image(path)
    with pytest.raises(ImageError, match="empty"):
        open_image(b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_refused(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encoded(Image.fromarray(noise), format)
    with pytest.raises(ImageError, match=r"cannot be (decoded|opened)|not an image"):
        open_image(content[: len(content) // 2])


def test_one_pixel_is_an_image():
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_a_strip_beyond_the_aspect_limit_is_refused_and_one_at_the_limit_is_not():
    with pytest.raises(ImageError, match=r"30000x2 is more elongated than max_aspect=200"):
        open_image(encoded(Image.new("L", (30000, 2))))
    assert open_image(encoded(Image.new("L", (2, 400)))).size == (2, 400)
    assert open_image(encoded(Image.new("L", (30000, 2))), max_aspect=15000).size == (30000, 2)


def bomb(width, height):
    """A PNG header that promises width x height pixels and holds none."""
    content = bytearray(encoded(Image.new("L", (1, 1))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_from_its_header():
    with pytest.raises(ImageError, match="more than max_pixels=134217728"):
        open_image(bomb(13_000, 13_000))
    with pytest.raises(ImageError, match="decompression bomb"):
        open_image(bomb(100_000, 100_000))
    with pytest.raises(ImageError, match=r"16x12 has 192 pixels, more than max_pixels=100"):
        open_image(GRADIENT, max_pixels=100)


def test_a_palette_becomes_its_colours():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette)).tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("mode, value", [("RGBA", (200, 0, 0, 0)), ("LA", (50, 0))])
def test_transparent_pixels_become_white(mode, value):
    assert pixels(encoded(Image.new(mode, (1, 1), value))).tolist() == [[[255, 255, 255]]]


def test_half_transparent_pixels_are_mixed_with_white_and_opaque_ones_kept():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((0, 0), (200, 0, 0, 128))
    half, opaque = pixels(encoded(image))[0]
    assert np.abs(half.astype(int) - [227, 127, 127]).max() <= 1
    assert opaque.tolist() == [200, 0, 0]


def test_a_transparent_palette_entry_and_a_transparent_colour_become_white():
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    assert pixels(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255]]]
    assert pixels(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))).tolist() == [[[255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    expected = [[[v] * 3 for v in (0, 1, 128, 255)]]
    assert pixels(encoded(Image.fromarray(values))).tolist() == expected
    assert pixels(values).tolist() == expected
    assert pixels(encoded(Image.fromarray(values.astype(np.int32)), "TIFF")).tolist() == expected


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(ImageError, match="exceed 16 bits"):
        open_image(Image.fromarray(np.array([[70000]], np.int32)))
    with pytest.raises(ImageError, match="no stated range"):
        open_image(Image.fromarray(np.array([[0.5]], np.float32)))
    with pytest.raises(ImageError, match=r"float64\[2, 2\]: expected uint8"):
        open_image(np.zeros((2, 2)))


def test_cmyk_is_converted():
    assert pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")).tolist() == [[[255, 0, 0]]]
    red = pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4].astype(int)
    assert np.abs(red - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_bilevel_images_become_rgb(mode):
    assert pixels(encoded(Image.new(mode, (1, 1), 255))).tolist() == [[[255, 255, 255]]]


def test_the_first_frame_of_an_animation_is_used():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(content)[0, 0].tolist() == [255, 0, 0]


def test_exif_rotation_is_ignored_by_default_and_applied_on_request():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    content = encoded(Image.fromarray(GRADIENT), "PNG", exif=exif)
    assert np.array_equal(pixels(content), GRADIENT)
    assert np.array_equal(pixels(content, exif="apply"), np.rot90(GRADIENT, -1))
    with pytest.raises(ValueError, match="known: ignore, apply"):
        open_image(content, exif="perhaps")


def test_image_errors_are_errors_of_the_request():
    from jaxvqa.errors import UserError

    assert issubclass(ImageError, UserError)


coordinate = st.floats(-30, 50, width=32)


@settings(max_examples=200)
@given(st.tuples(coordinate, coordinate, coordinate, coordinate))
def test_a_crop_is_pillows_crop_where_the_box_lies_inside_and_never_leaves_the_image(box):
    image = Image.fromarray(GRADIENT)
    rounded = [round(v) for v in box]
    inside = 0 <= rounded[0] and 0 <= rounded[1] and rounded[2] <= 16 and rounded[3] <= 12
    try:
        ours = crop(image, box)
    except ImageError:
        clamped = np.clip(rounded, 0, [16, 12, 16, 12])
        assert clamped[0] >= clamped[2] or clamped[1] >= clamped[3]
        return
    assert ours.width <= 16 and ours.height <= 12
    if inside:
        assert np.array_equal(ours, image.crop(box))


def test_crop_is_half_open_and_rounds_half_to_even():
    image = Image.fromarray(GRADIENT)
    assert np.array_equal(crop(image, (2, 3, 5, 7)), GRADIENT[3:7, 2:5])
    assert pixel_box((0.5, 1.5, 2.5, 3.5), (16, 12)) == (0, 2, 2, 4)
    assert pixel_box(np.float32([-4, -4, 99, 99]), (16, 12)) == (0, 0, 16, 12)


@pytest.mark.parametrize("box", [(3, 3, 3, 9), (9, 0, 3, 4), (20, 0, 30, 5), (0, 0, float("nan"), 4), (0, 0, 1)])
def test_a_box_without_pixels_is_an_error(box):
    with pytest.raises(ImageError, match="box"):
        crop(Image.fromarray(GRADIENT), box)


@pytest.mark.parametrize("size", [(4, 2), (2, 4), (5, 2), (3, 3), (1, 4)])
def test_padding_centres_the_image_on_the_clip_mean(size):
    image = Image.new("RGB", size, (1, 2, 3))
    square = np.asarray(pad_to_square(image))
    side, left, top = max(size), (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
    expected = np.full((side, side, 3), (122, 116, 104))
    expected[top : top + size[1], left : left + size[0]] = (1, 2, 3)
    assert np.array_equal(square, expected)


def test_an_overlay_is_brightest_where_the_map_is_and_outlines_the_box():
    image = Image.new("RGB", (64, 48), (100, 100, 100))
    heat = np.zeros((3, 4))
    heat[0, 3] = 5
    drawn = np.asarray(overlay(image, heat, [(8, 24, 24, 40)])).astype(int)
    brightness = drawn.sum(-1)
    assert drawn.shape == (48, 64, 3)
    assert brightness[4, 60] > brightness[44, 40] + 100
    assert drawn[24, 8:24].tolist() == [[0, 229, 255]] * 16
    assert (drawn[39, 23] == drawn[24, 8]).all() and not (drawn[40, 24] == drawn[24, 8]).all()
    assert image.getpixel((8, 24)) == (100, 100, 100)


def test_an_overlay_of_nothing_is_the_image_and_a_constant_map_is_dark():
    image = Image.fromarray(GRADIENT)
    assert np.array_equal(overlay(image), GRADIENT)
    assert np.asarray(overlay(image, np.ones((2, 2)), opacity=1.0)).max() <= 4
    with pytest.raises(ValueError, match="finite"):
        overlay(image, np.full((2, 2), np.nan))


def test_the_colour_map_gets_lighter_all_the_way():
    colours = images.colour_map(np.linspace(0, 1, 256)).astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) >= -1.5).all() and lightness[-1] - lightness[0] > 230
