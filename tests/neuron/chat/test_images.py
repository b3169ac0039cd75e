"""Images of requests: found, bounded, decoded."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cortex.core.errors import BadRequestError, InvalidImageError, UnsupportedFieldError
from cortex.core.openai import ImagePart, Message, TextPart
from cortex.neuron.chat.images import (
    ImageData,
    ImageLimits,
    ImageReader,
    PreparedImage,
    expand,
    find_images,
    spans_of,
)
from cortex.neuron.models.vision_config import ImageRules, VisionConfig
from tests.support.pictures import data_uri, encoded, image, png

CONFIG = VisionConfig(
    depth=1,
    hidden_size=32,
    intermediate_size=32,
    num_heads=2,
    patch_size=4,
    merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=64,
    grid_side=5,
    image_token_id=264,
    rules=ImageRules(min_pixels=64, max_pixels=64 * 100),
)


def refs_of(*images: Any):
    parts = [TextPart(text="see"), *[ImagePart(image_url=each) for each in images]]
    return find_images([Message(role="system", content="x"), Message(role="user", content=parts)])


def reader(**limits: int) -> ImageReader:
    return ImageReader(CONFIG, ImageLimits(**limits))


def read(*urls: str, **limits: int) -> list[PreparedImage]:
    return [each.decode() for each in reader(**limits).open(refs_of(*urls), {})]


def test_images_are_counted_over_all_messages_and_know_their_place():
    first, second = refs_of({"url": "data:,"}, "https://a/b.png")
    assert (first.name, first.param, first.is_remote) == (
        "image 1",
        "messages[1].content[1]",
        False,
    )
    assert (second.name, second.param) == ("image 2", "messages[1].content[2]")
    assert second.is_remote


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "image 1: image_url needs a url"),
        (None, "needs a url"),
        ({"url": 5}, "needs a url"),
        ({"url": ""}, "needs a url"),
        ({"url": "data:,", "detail": "huge"}, "detail is low, high, original or auto"),
    ],
)
def test_a_part_without_an_image_is_refused_by_its_place(told: Any, message: str):
    with pytest.raises(InvalidImageError, match=message) as caught:
        refs_of(told)
    assert (caught.value.param, caught.value.code) == ("messages[1].content[1]", "invalid_image")


def transparent(kind: str) -> Image.Image:
    rgba = image(30, 20).convert("RGBA")
    rgba.putalpha(image(30, 20, 9).convert("L"))
    return rgba if kind == "RGBA" else rgba.convert(kind)


FILES = {
    "png": (png(40, 24), "image/png"),
    "to be scaled down": (png(200, 160), "image/png"),
    "to be scaled up": (png(3, 5), "image/png"),
    "jpeg": (encoded(image(41, 26), "JPEG"), "image/jpeg"),
    "jpeg under another name": (encoded(image(41, 26), "JPEG"), "image/jpg"),
    "jpeg in cmyk": (encoded(image(41, 26).convert("CMYK"), "JPEG"), "image/jpeg"),
    "webp": (encoded(image(33, 20), "WEBP", lossless=True), "image/webp"),
    "gif": (encoded(image(33, 20).quantize(16), "GIF"), "image/gif"),
    "grey": (encoded(image(33, 20).convert("L")), "image/png"),
    "transparent": (encoded(transparent("RGBA")), "image/png"),
    "transparent grey": (encoded(transparent("LA")), "image/png"),
    "palette": (encoded(image(33, 20).quantize(8), transparency=3), "image/png"),
    "type not told": (png(40, 24), "application/octet-stream"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_transformers(name: str):
    data, media_type = FILES[name]
    (got,) = read(data_uri(data, media_type))
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 64 * 100},
        # What is left is 0 to 255, so that it can be compared exactly.
        do_rescale=False,
        do_normalize=False,
    )
    want = processor([Image.open(io.BytesIO(data))], return_tensors="np")
    _, rows, columns = want["image_grid_thw"][0]
    assert (got.height, got.width) == (4 * rows, 4 * columns)
    patches = want["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 4, 4)[..., 0, :, :]
    full = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(4 * rows, 4 * columns, 3)
    pixels = np.frombuffer(got.pixels, np.uint8).reshape(full.shape)
    assert pixels.std() > 5
    np.testing.assert_array_equal(pixels, full)


def test_a_photograph_taken_sideways_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image(48, 16), "PNG", exif=exif)
    (got,) = read(data_uri(data))
    assert (got.width, got.height) == (16, 48)
    (upright,) = read(data_uri(encoded(image(48, 16).transpose(Image.Transpose.ROTATE_270))))
    assert got == upright
    (opened,) = reader().open(refs_of(data_uri(data)), {})
    assert (opened.num_tokens, opened.size.width) == (12, 16)


def test_counting_needs_no_more_than_the_head_of_a_file():
    data = encoded(image(200, 160), "JPEG")[:1000]
    (opened,) = reader().open(refs_of(data_uri(data, "image/jpeg")), {})
    assert opened.num_tokens == 88
    with pytest.raises(InvalidImageError, match="cut short"):
        opened.decode()


def test_detail_low_makes_an_overview():
    large = data_uri(png(1600, 1200))
    config = VisionConfig(**{**_fields(CONFIG), "rules": ImageRules()})
    open_ = ImageReader(config, ImageLimits(max_tokens=16384, max_total_tokens=65536)).open
    (full,), (low,) = open_(refs_of(large), {}), open_(refs_of({"url": large, "detail": "low"}), {})
    assert (full.size.width, full.size.height) == (1176, 880)
    assert (low.size.width, low.size.height) == (584, 440)


def _fields(config: VisionConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_a_large_image_is_scaled_down_to_the_operators_bound():
    (got,) = read(data_uri(png(200, 160)), max_tokens=20)
    assert (got.width * got.height) // 64 == 20


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BROKEN = {
    "cut short": (data_uri(png(40, 24)[:-300]), "damaged or cut short"),
    "cut short jpeg": (
        data_uri(encoded(image(64, 64), "JPEG")[:-900], "image/jpeg"),
        "damaged or cut short",
    ),
    "a bomb": (data_uri(bomb(30_000, 30_000)), "over the bound of 40 megapixels"),
    "a larger bomb": (data_uri(bomb(2_000_000, 2_000_000)), "over the bound of 40 megapixels"),
    "no image": (data_uri(b"hello"), "its 5 bytes are no image of a known type"),
    "empty": ("data:image/png;base64,", "its 0 bytes are no image"),
    "another type": (data_uri(png(8, 8), "image/jpeg"), "said to be image/jpeg and is image/png"),
    "a type that is not read": (data_uri(png(8, 8), "image/tiff"), "type 'image/tiff' cannot be"),
    "a text": (data_uri(b"x", "text/html"), "type 'text/html' cannot be read"),
    "a format that is not read": (
        data_uri(encoded(image(8, 8), "BMP"), "application/octet-stream"),
        "no image of a known type",
    ),
    "no comma": ("data:image/png;base64", "no comma"),
    "a long type": ("data:" + "x" * 100_000 + ";base64,", "no comma after its type"),
    "too many scans": (
        data_uri(encoded(image(8, 8), "JPEG") + b"\xff\xda" * 100, "image/jpeg"),
        "more than 100 scans",
    ),
    "no base64": ("data:image/png,abc", "has to be in base64"),
    "bad base64": ("data:image/png;base64,ab!c", "not base64"),
    "a strip": (data_uri(png(2100, 10)), "over 200 times the other"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_image_is_refused_by_its_number(name: str):
    url, message = BROKEN[name]
    good = data_uri(png(8, 8))
    with pytest.raises(InvalidImageError, match=message) as caught:
        read(good, url)
    assert caught.value.message.startswith("image 2: ")
    assert caught.value.param == "messages[1].content[2]"
    assert caught.value.status == 400


def test_an_image_of_too_many_bytes_is_refused_before_it_is_decoded():
    with pytest.raises(InvalidImageError, match=r"image 1: it is over 0\.000976562 MiB"):
        read(data_uri(png(64, 64)), max_bytes=1024)


def test_the_number_of_images_is_bounded():
    with pytest.raises(BadRequestError, match="have 3 images, a request may have 2"):
        read(*[data_uri(png(8, 8))] * 3, max_images=2)


def test_the_tokens_of_all_images_are_bounded():
    with pytest.raises(InvalidImageError, match="image 3: with it the images have over 25 tokens"):
        read(*[data_uri(png(32, 24))] * 3, max_total_tokens=25)


def test_fetched_images_are_read_like_inline_ones():
    found = {"https://a/b.png": ImageData("image/png", png(40, 24))}
    (opened,) = reader().open(refs_of("https://a/b.png"), found)
    assert [opened.decode()] == read(data_uri(png(40, 24)))


def test_digests_tell_images_apart_by_pixels_and_by_shape():
    one = PreparedImage(width=16, height=8, pixels=b"x" * 384)
    assert one.digest == PreparedImage(width=16, height=8, pixels=b"x" * 384).digest
    assert one.digest != PreparedImage(width=8, height=16, pixels=b"x" * 384).digest
    assert one.digest != PreparedImage(width=16, height=8, pixels=b"y" * 384).digest


def test_each_place_gets_as_many_tokens_as_its_image_has():
    ids, starts = expand([1, 264, 2, 264], [3, 1], 264, "m")
    assert ids == [1, 264, 264, 264, 2, 264]
    assert starts == [1, 5]
    images = [
        PreparedImage(width=8, height=24, pixels=b"a"),
        PreparedImage(width=8, height=8, pixels=b"b"),
    ]
    assert [(each.start, each.height) for each in spans_of(images, starts)] == [(1, 24), (5, 8)]


def test_a_template_without_a_place_is_told():
    with pytest.raises(UnsupportedFieldError, match="template of model 'm' has no place"):
        expand([1, 2], [3], 264, "m")


def test_a_text_with_the_images_token_is_refused():
    with pytest.raises(BadRequestError, match="contains the token that stands for an image"):
        expand([264, 1, 264], [3], 264, "m")
