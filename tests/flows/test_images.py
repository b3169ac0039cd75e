"""Images over HTTP: a gateway, a neuron and its real engine, in both dialects."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
import torch
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from PIL import Image

from cortex.core.config import Vision
from cortex.neuron.app import ENGINE_COMMAND
from cortex.neuron.chat.images import ImageLimits
from cortex.neuron.chat.model import load_chat_model
from cortex.neuron.chat.prepare import prepare
from cortex.neuron.models.registry import load_causal_lm
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints
from tests.support.chat_models import chat_request
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.neuron_http import add_chat_model, neuron
from tests.support.pictures import encoded, image, image_block, image_part, png
from tests.support.seeing import Seeing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
TEXT = {"type": "text", "text": "What is this?"}
LIMITS = Vision(max_images=3, max_image_mb=1, max_megapixels=2, max_total_tokens=150)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "eyes"
    checkpoints.qwen3_5_wrapper(path)
    checkpoints.write_image_rules(path, min_pixels=64, max_pixels=64 * 64)
    checkpoints.write_tokenizer(path, has_vision=True)
    return path


@asynccontextmanager
async def fleet(directory: Path, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """Run a node with a model that sees and one that does not, behind a gateway."""
    shutil.copytree(directory, tmp_path / "models" / "eyes")
    add_chat_model(tmp_path / "models", "blind")
    async with (
        neuron(tmp_path, engine_command=ENGINE_COMMAND, vision=LIMITS) as api,
        run_gateway({"a": api.url}) as gateway,
    ):
        assert (await api.load("eyes")).json["status"] == "loaded"
        yield gateway


async def ask(gateway: RunningGateway, path: str, **fields: Any) -> tuple[int, Any]:
    reply = await gateway.post(path, {"model": "eyes", **fields})
    return reply.status, await reply.json(content_type=None)


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def expected(directory: Path, content: list[Any], count: int) -> tuple[str, int]:
    """Return what the checkpoint goes on with, and the tokens of its prompt."""
    source = ModelSource(kind="hf", path=str(directory))
    chat = load_chat_model(
        source, model_id="m", cache_dir=directory / "cache", image_limits=ImageLimits()
    )
    prepared = prepare(chat_request(messages=user(*content)), chat)
    model = load_causal_lm(
        source, device=torch.device("cpu"), dtype=None, progress=lambda done, total: None
    )
    pieces: list[Any] = list(prepared.prompt_ids)
    for span, pixels in zip(reversed(prepared.spans), reversed(prepared.pixels), strict=True):
        flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        num_tokens = span.width * span.height // 64
        pieces[span.start : span.start + num_tokens] = [flat.view(span.height, span.width, 3)]
    seeing = Seeing(model)
    sequence = seeing.sequence(pieces)
    assert sequence.token_ids == prepared.prompt_ids
    (logits,) = seeing.step((sequence, sequence.num_pending))
    found = [int(logits[-1].argmax())]
    while len(found) < count:
        sequence.token_ids.append(found[-1])
        (logits,) = seeing.step((sequence, 1))
        found.append(int(logits[-1].argmax()))
    return chat.tokenizer.decode(found, keep_special=False), len(prepared.prompt_ids)


async def test_both_dialects_answer_images_and_refuse_bad_ones(directory: Path, tmp_path: Path):
    async with fleet(directory, tmp_path) as gateway:
        await answers_are_the_checkpoints_own(gateway, directory)
        await tool_results_may_have_images(gateway)
        await models_are_listed_with_what_they_take(gateway)
        await bad_images_are_refused(gateway)
        await a_model_without_eyes_refuses_images(gateway)


async def answers_are_the_checkpoints_own(gateway: RunningGateway, directory: Path) -> None:
    first, second = png(60, 45, 1), encoded(image(30, 52, 2), "JPEG")
    parts = [image_part(first), TEXT, image_part(second, "image/jpeg")]
    text, num_prompt = expected(directory, parts, 12)
    options = {"max_tokens": 12, "temperature": 0}
    status, whole = await ask(gateway, CHAT, messages=user(*parts), **options)
    assert status == 200, whole
    assert whole["choices"][0]["message"]["content"] == text
    assert whole["usage"]["prompt_tokens"] == num_prompt

    blocks = [image_block(first), TEXT, image_block(second, "image/jpeg")]
    status, message = await ask(gateway, MESSAGES, messages=user(*blocks), **options)
    assert status == 200, message
    assert message["content"] == [{"type": "text", "text": text}]
    usage = message["usage"]
    assert usage["input_tokens"] + (usage["cache_read_input_tokens"] or 0) == num_prompt
    status, counted = await ask(gateway, COUNT, messages=user(*blocks))
    assert counted == {"input_tokens": num_prompt}

    async with gateway.open_chat("eyes", messages=user(*parts), **options) as reply:
        lines = (await reply.text()).split("\n\n")
    events = [line[6:] for line in lines if line.startswith("data: {")]
    deltas = [msgspec.json.decode(each)["choices"][0]["delta"] for each in events]
    assert "".join(each.get("content") or "" for each in deltas) == text

    await sdks_are_answered_alike(gateway, parts, blocks, text)

    # Another image, another answer.
    likely = []
    for image_bytes in (first, first, png(60, 45, 7)):
        other = [image_part(image_bytes), TEXT, image_part(second, "image/jpeg")]
        status, answer = await ask(gateway, CHAT, messages=user(*other), logprobs=True, **options)
        likely.append([each["logprob"] for each in answer["choices"][0]["logprobs"]["content"]])
    assert likely[0] == pytest.approx(likely[1], abs=1e-3)
    assert abs(likely[0][0] - likely[2][0]) > 0.01


async def sdks_are_answered_alike(
    gateway: RunningGateway, parts: list[Any], blocks: list[Any], text: str
) -> None:
    bad = image_block(b"hello")
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "eyes", "temperature": 0}
        completion = await client.chat.completions.create(
            messages=user(*parts), max_tokens=12, **asked
        )
        assert completion.choices[0].message.content == text
        items = [
            {"type": "input_text", "text": each["text"]}
            if each["type"] == "text"
            else {"type": "input_image", "image_url": each["image_url"]["url"]}
            for each in parts
        ]
        response = await client.responses.create(input=user(*items), max_output_tokens=12, **asked)
        assert response.output_text == text
        with pytest.raises(openai.BadRequestError, match="image 1: its 5 bytes"):
            await client.chat.completions.create(messages=user(image_part(b"hello")), **asked)
    async with AsyncAnthropic(base_url=gateway.url, api_key="none", max_retries=0) as client:
        options: Any = {"model": "eyes", "max_tokens": 12, "extra_body": {"temperature": 0}}
        message = await client.messages.create(messages=user(*blocks), **options)
        assert [each.text for each in message.content] == [text]
        with pytest.raises(anthropic.BadRequestError, match="image 1: its 5 bytes"):
            await client.messages.create(messages=user(bad), **options)


async def tool_results_may_have_images(gateway: RunningGateway) -> None:
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [TEXT, image_block(png(16, 16))],
    }
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    status, with_image = await ask(gateway, COUNT, messages=messages)
    assert status == 200, with_image
    result["content"] = [TEXT]
    status, without = await ask(gateway, COUNT, messages=messages)
    # Four tokens of the image, the two around it, and a turn of its own with 17 bytes of marks.
    assert with_image["input_tokens"] > without["input_tokens"] + 6
    result["content"] = [TEXT, image_block(png(16, 16))]
    status, message = await ask(gateway, MESSAGES, messages=messages, max_tokens=2)
    assert status == 200, message
    assert message["usage"]["input_tokens"] == with_image["input_tokens"]


async def models_are_listed_with_what_they_take(gateway: RunningGateway) -> None:
    reply = await gateway.get("/v1/models")
    cards = {each["id"]: each for each in (await reply.json())["data"]}
    assert cards["eyes"]["capabilities"] == ["text", "vision"]
    assert cards["cortex-tiny"]["capabilities"] == ["text"]


# A few bytes that say they are two million pixels.
FLAT = encoded(Image.new("RGB", (2000, 1001)))
BAD: dict[str, tuple[list[Any], str]] = {
    "cut short": ([image_part(png(40, 40)[:-400])], "image 1: the file is damaged or cut short"),
    "a bomb": ([image_part(png(4, 4)), image_part(FLAT)], "image 2: 2000 x 1001 pixels"),
    "another type": (
        [image_part(png(4, 4), "image/webp")],
        "said to be image/webp and is image/png",
    ),
    "no image": ([image_part(b"hello", "image/png")], "image 1: its 5 bytes are no image"),
    "huge": ([image_part(bytes(1_100_000))], "image 1: it is over 1 MiB"),
    "too many": ([image_part(png(8, 8))] * 4, "have 4 images, a request may have 3"),
    "too many tokens": (
        [image_part(png(64, 64))] * 3,
        "image 3: with it the images have over 150 tokens",
    ),
    "an address": (
        [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}],
        "images of 169.254.169.254 are not fetched",
    ),
}


async def bad_images_are_refused(gateway: RunningGateway) -> None:
    for name, (parts, message) in BAD.items():
        for stream in (False, True):
            status, answer = await ask(
                gateway, CHAT, messages=user(TEXT, *parts), max_tokens=1, stream=stream
            )
            assert status == 400, (name, answer)
            assert message in answer["error"]["message"], (name, answer)
            if name != "too many":
                assert answer["error"]["code"] == "invalid_image"
                assert answer["error"]["param"] == f"messages[0].content[{len(parts)}]"
        blocks = [_block(each) for each in parts]
        for path in (MESSAGES, COUNT):
            if path == COUNT and name == "cut short":
                continue
            fields = {"max_tokens": 1} if path == MESSAGES else {}
            status, answer = await ask(gateway, path, messages=user(TEXT, *blocks), **fields)
            assert status == 400, (name, answer)
            assert answer["error"]["type"] == "invalid_request_error"
            assert message in answer["error"]["message"]
    # Whatever is in a text, it stands for no image.
    marks = {"type": "text", "text": "<|image_pad|>"}
    status, answer = await ask(gateway, CHAT, messages=user(marks, image_part(png(8, 8))))
    assert status == 400
    assert "contains the token that stands for an image" in answer["error"]["message"]


def _block(part: dict[str, Any]) -> dict[str, Any]:
    url = part["image_url"]["url"]
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    head, _, data = url.partition(",")
    media_type = head[5:].partition(";")[0]
    source = {"type": "base64", "media_type": media_type, "data": data}
    return {"type": "image", "source": source}


async def a_model_without_eyes_refuses_images(gateway: RunningGateway) -> None:
    for model in ("blind", "cortex-tiny"):
        for stream in (False, True):
            fields = {"model": model, "max_tokens": 1, "stream": stream}
            status, answer = await ask(
                gateway, CHAT, messages=user(image_part(png(8, 8))), **fields
            )
            assert status == 400
            assert answer["error"]["code"] == "unsupported_field"
            assert "cannot take images" in answer["error"]["message"]
            status, answer = await ask(
                gateway, MESSAGES, messages=user(image_block(png(8, 8))), **fields
            )
            assert status == 400
            assert answer["error"]["type"] == "invalid_request_error"
            assert "cannot take images" in answer["error"]["message"]
        status, answer = await ask(
            gateway, COUNT, model=model, messages=user(image_block(png(8, 8)))
        )
        assert status == 400
        assert "cannot take images" in answer["error"]["message"]
