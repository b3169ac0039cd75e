"""The images of a request: found in its messages, bounded, decoded and brought to size.

Decoding takes up to seconds of a processor, so all that reads an image is for a thread. A name
such as `image 2` counts the images of a request from 1, which is the same in every dialect.
"""

import binascii
import hashlib
import io
import re
import struct
import zlib
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from cortex.core.errors import BadRequestError, InvalidImageError, UnsupportedFieldError
from cortex.core.openai import ImagePart, Message
from cortex.neuron.engine.protocol import MAX_PIXEL_BYTES, ImageSpan
from cortex.neuron.models.vision_config import CHANNELS, ImageSize, VisionConfig

# Sizes are checked here, before anything is decoded, and against the operator's own bound.
Image.MAX_IMAGE_PIXELS = None

# What a client means by `detail: low`: an overview at a fixed price.
LOW_DETAIL_PIXELS = 512 * 512
MIB = 1 << 20

_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
# Phones put several pictures into one JPEG file; the first one counts.
_TYPES = {name: mime for mime, name in _FORMATS.items()} | {"MPO": "image/jpeg"}
_ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg"}
# What is said by those that do not know.
_UNTOLD = ("", "image/*", "application/octet-stream", "binary/octet-stream")
_DATA_URI = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
_DETAILS = (None, "auto", "low", "high", "original")
_SHOWN_CHARS = 64
_MAX_HEAD_CHARS = 512
# A photograph has about ten passes; a file can have thousands, each over all of its pixels.
MAX_JPEG_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
# Orientations of a photograph that lies on its side.
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)

# What Pillow's decoders raise for files that are not what they say.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What the images of one request may be.

    Attributes:
        max_bytes: of one image as it is sent.
        max_pixels: of one image as it is stored in its file.
        max_tokens: of one image; a larger one is scaled down.
        max_total_tokens: of all images of a request.
    """

    max_images: int = 32
    max_bytes: int = 20 * MIB
    max_pixels: int = 40_000_000
    max_tokens: int = 4096
    max_total_tokens: int = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """An image part of the messages.

    Attributes:
        name: what errors call it.
        param: where it stands.
        url: with its data, or where they are.
        is_low: whether an overview will do.
    """

    name: str
    param: str
    url: str
    is_low: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether the data are elsewhere."""
        return self.url[:5].lower() != "data:"

    def error(self, problem: str) -> InvalidImageError:
        """Return the error that this image is the cause of."""
        return InvalidImageError(f"{self.name}: {problem}", param=self.param)


@dataclass(frozen=True, slots=True)
class ImageData:
    """An encoded image and its type as its sender tells it; empty where it tells none."""

    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """An image in its final size, as the engine takes it."""

    width: int
    height: int
    pixels: bytes

    @property
    def digest(self) -> bytes:
        """The same for the same pixels and size, and for no other ones."""
        size = f"{self.width}x{self.height}:".encode()
        return hashlib.sha256(size + self.pixels).digest()


def find_images(messages: Sequence[Message]) -> list[ImageRef]:
    """Return the images of some messages, in order.

    Raises:
        InvalidImageError: one names no data and no address.
    """
    found: list[ImageRef] = []
    for at, message in enumerate(messages):
        parts = message.content if isinstance(message.content, list) else []
        for part_at, part in enumerate(parts):
            if isinstance(part, ImagePart):
                name = f"image {len(found) + 1}"
                found.append(_ref(name, f"messages[{at}].content[{part_at}]", part))
    return found


def _ref(name: str, param: str, part: ImagePart) -> ImageRef:
    told = part.image_url
    fields = told if isinstance(told, dict) else {"url": told}
    url, detail = fields.get("url"), fields.get("detail")
    if not isinstance(url, str) or not url:
        raise InvalidImageError(
            f"{name}: image_url needs a url, a data: URI or an http(s) address", param=param
        )
    if detail not in _DETAILS:
        raise InvalidImageError(f"{name}: detail is low, high, original or auto", param=param)
    return ImageRef(name=name, param=param, url=url, is_low=detail == "low")


class ImageReader:
    """Reads the images of requests for one model.

    Args:
        config: of the model's vision tower.
    """

    def __init__(self, config: VisionConfig, limits: ImageLimits) -> None:
        self._config = config
        self._limits = limits

    @property
    def image_token_id(self) -> int:
        """What a template puts in the place of an image."""
        return self._config.image_token_id

    def open(
        self, refs: Sequence[ImageRef], fetched: Mapping[str, ImageData]
    ) -> list["OpenedImage"]:
        """Return the images, none of them decoded yet.

        Args:
            fetched: the data of those that are elsewhere, by address.

        Raises:
            InvalidImageError: one is of an unknown type or over a bound; names it.
            BadRequestError: they are too many.
        """
        most = self._limits.max_images
        if len(refs) > most:
            raise BadRequestError(
                f"the messages have {len(refs)} images, a request may have {most}; "
                "leave older ones out",
                param="messages",
            )
        opened: list[OpenedImage] = []
        most, num_tokens = self._limits.max_total_tokens, 0
        for ref in refs:
            opened.append(self._open(ref, fetched))
            num_tokens += opened[-1].num_tokens
            if num_tokens > most:
                raise ref.error(
                    f"with it the images have over {most} tokens; send fewer or smaller ones, or "
                    "detail: low"
                )
        return opened

    def _open(self, ref: ImageRef, fetched: Mapping[str, ImageData]) -> "OpenedImage":
        image = _opened(ref, self._encoded(ref, fetched))
        width, height = image.size
        most = self._limits.max_pixels
        if width * height > most:
            raise ref.error(
                f"{width} x {height} pixels are over the bound of {most / 1e6:g} megapixels; "
                "scale it down"
            )
        try:
            if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
        except _BROKEN as exc:
            raise ref.error("the file is damaged or cut short") from exc
        area = self._config.token_side**2
        most = min(self._limits.max_tokens * area, MAX_PIXEL_BYTES // CHANNELS)
        if ref.is_low:
            most = min(most, LOW_DETAIL_PIXELS)
        try:
            final = self._config.final_size(ImageSize(width, height), most)
        except ValueError as exc:
            raise ref.error(f"{width} x {height} pixels: {exc}") from exc
        return OpenedImage(
            ref=ref, image=image, size=final, num_tokens=self._config.num_tokens(final)
        )

    def _encoded(self, ref: ImageRef, fetched: Mapping[str, ImageData]) -> ImageData:
        most = self._limits.max_bytes
        found = fetched[ref.url] if ref.is_remote else _inline(ref, most)
        if len(found.data) > most:
            raise _too_large(ref, most)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedImage:
    """An image that is not decoded yet.

    Attributes:
        size: that it is going to have.
    """

    ref: ImageRef
    image: Image.Image
    size: ImageSize
    num_tokens: int

    def decode(self) -> PreparedImage:
        """Return it as the engine takes it; raises InvalidImageError where it is broken."""
        size = self.size
        try:
            upright = ImageOps.exif_transpose(self.image)
            final = _on_white(upright).resize((size.width, size.height), Image.Resampling.BICUBIC)
        except _BROKEN as exc:
            raise self.ref.error("the file is damaged or cut short") from exc
        return PreparedImage(width=size.width, height=size.height, pixels=final.tobytes())


def _too_large(ref: ImageRef, max_bytes: int) -> InvalidImageError:
    return ref.error(f"it is over {max_bytes / MIB:g} MiB; make it smaller")


def _inline(ref: ImageRef, max_bytes: int) -> ImageData:
    head = _DATA_URI.match(ref.url, 0, _MAX_HEAD_CHARS)
    if head is None:
        raise ref.error("the data: URI has no comma after its type")
    if not head[2].lower().endswith(";base64"):
        raise ref.error("the data: URI has to be in base64")
    if (len(ref.url) - head.end()) // 4 * 3 > max_bytes + 2:
        raise _too_large(ref, max_bytes)
    try:
        return ImageData(head[1], b64decode(ref.url[head.end() :].strip(), validate=True))
    except (binascii.Error, ValueError) as exc:
        raise ref.error("its data are not base64") from exc


def _opened(ref: ImageRef, found: ImageData) -> Image.Image:
    told = found.media_type.strip().lower()
    told = _ALIASES.get(told, told)
    if told not in _FORMATS and told not in _UNTOLD:
        raise ref.error(
            f"images of type '{told[:_SHOWN_CHARS]}' cannot be read; send {', '.join(_FORMATS)}"
        )
    try:
        image = Image.open(io.BytesIO(found.data), formats=list(_FORMATS.values()))
    except _BROKEN as exc:
        raise ref.error(
            f"its {len(found.data)} bytes are no image of a known type; send {', '.join(_FORMATS)}"
        ) from exc
    actual = _TYPES.get(image.format or "")
    if told in _FORMATS and actual != told:
        raise ref.error(f"it is said to be {told} and is {actual}")
    if actual == "image/jpeg" and found.data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise ref.error(f"it has more than {MAX_JPEG_SCANS} scans; save it again as a plain JPEG")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image without transparency, as the towers saw it in training."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")


def expand(
    ids: list[int], counts: Sequence[int], image_token_id: int, model_id: str
) -> tuple[list[int], list[int]]:
    """Give each image's place in a prompt as many tokens as the image has.

    Returns:
        The prompt, and the index of each image's first token in it.

    Raises:
        UnsupportedFieldError: the template has no place for images.
        BadRequestError: a text contains what stands for an image.
    """
    places = [at for at, token_id in enumerate(ids) if token_id == image_token_id]
    if len(places) < len(counts):
        raise UnsupportedFieldError(
            f"the chat template of model {model_id!r} has no place for these images",
            param="messages",
        )
    if len(places) > len(counts):
        raise BadRequestError(
            "a text of the messages contains the token that stands for an image; take it out",
            param="messages",
        )
    expanded: list[int] = []
    starts: list[int] = []
    done = 0
    for at, count in zip(places, counts, strict=True):
        expanded += ids[done:at]
        starts.append(len(expanded))
        expanded += [image_token_id] * count
        done = at + 1
    return expanded + ids[done:], starts


def spans_of(images: Sequence[PreparedImage], starts: Sequence[int]) -> list[ImageSpan]:
    """Return where the images stand, for the engine."""
    return [
        ImageSpan(start=start, width=image.width, height=image.height, digest=image.digest)
        for image, start in zip(images, starts, strict=True)
    ]
