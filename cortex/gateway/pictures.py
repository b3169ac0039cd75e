"""Images in requests, as far as a gateway has to know of them: are there any, and how long is
what is left.

An image's bytes say little about its tokens, so where a prompt's length is guessed from its
bytes, each image counts as one of usual size.
"""

import msgspec

# What a screenshot of full size has, about.
IMAGE_TOKENS = 2000
# A string this long without a blank near its beginning is no text but an image's data.
MIN_DATA_BYTES = 4096
_LOOKED_AT_BYTES = 512
_NAME = b'"image_url"'


class _Part(msgspec.Struct):
    type: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Request(msgspec.Struct):
    messages: list[_Message] = []


_decoder = msgspec.json.Decoder(_Request)


def has_images(body: bytes) -> bool:
    """Whether a request in OpenAI's dialect has images; an unreadable one has none."""
    if _NAME not in body:
        return False
    try:
        request = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return any(
        part.type == "image_url"
        for message in request.messages
        if isinstance(message.content, list)
        for part in message.content
    )


def text_bytes(body: bytes, bytes_per_token: float) -> int:
    """Return the bytes of a request of either dialect, with each image as long as its tokens."""
    if len(body) < MIN_DATA_BYTES:
        return len(body)
    sizes = [len(each) for each in body.split(b'"') if _is_data(each)]
    return len(body) - sum(sizes) + int(len(sizes) * IMAGE_TOKENS * bytes_per_token)


def _is_data(text: bytes) -> bool:
    if len(text) < MIN_DATA_BYTES:
        return False
    head = text[:_LOOKED_AT_BYTES]
    return b" " not in head and b"\\n" not in head and head.isascii()
