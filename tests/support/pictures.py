"""Encoded images for requests."""

import base64
import io
from typing import Any

from PIL import Image

from tests.support.seeing import picture


def image(width: int, height: int, seed: int = 3) -> Image.Image:
    """Return an image of noise."""
    return Image.fromarray(picture(height, width, seed).numpy())


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, seed: int = 3) -> bytes:
    """Return a PNG file of noise."""
    return encoded(image(width, height, seed))


def data_uri(data: bytes, media_type: str = "image/png") -> str:
    """Return a `data:` URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, media_type: str = "image/png", **fields: Any) -> dict[str, Any]:
    """Return an OpenAI content part."""
    return {"type": "image_url", "image_url": {"url": data_uri(data, media_type), **fields}}


def image_block(data: bytes, media_type: str = "image/png") -> dict[str, Any]:
    """Return an Anthropic content block."""
    text = base64.b64encode(data).decode()
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": media_type, "data": text},
    }
