import msgspec

from cortex.gateway.pictures import has_images, text_bytes
from tests.support.pictures import image_block, image_part, png


def body(*content: object) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": content}]})


def test_an_image_part_is_found_and_its_name_in_a_text_is_none():
    text = {"type": "text", "text": 'what is "image_url"?'}
    assert has_images(body(text, image_part(png(8, 8))))
    assert not has_images(body(text))
    assert not has_images(body({"type": "text", "image_url": "x"}))
    assert not has_images(b'{"messages": [{"content": "say \\"image_url\\""}]}')


def test_an_unreadable_request_has_no_images():
    assert not has_images(b'{"messages": "image_url"')
    assert not has_images(b'{"image_url": 1, "messages": 5, "x": "image_url"}')


def test_an_image_counts_as_long_as_its_tokens_in_either_dialect():
    text = {"type": "text", "text": "word " * 1000}
    plain = len(body(text))
    for image in (image_part(png(100, 100)), image_block(png(100, 100))):
        assert len(body(text, image)) > plain + 30_000
        assert plain + 8000 < text_bytes(body(text, image), 4.0) < plain + 8200


def test_texts_are_counted_as_they_are():
    for text in ("word " * 4000, "line\n" * 4000, "日本" * 4000, "x" * 3000):
        request = body({"type": "text", "text": text})
        assert text_bytes(request, 4.0) == len(request)
