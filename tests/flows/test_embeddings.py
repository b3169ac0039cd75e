"""`client.embeddings` of the official openai SDK against `cortex up DIR` with a real model."""

import base64
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import anthropic
import numpy as np
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.support import embedding_checkpoints as made
from tests.support.processes import Cortex, cortex_up

MINILM = made.minilm()
MODEL = "all-MiniLM-L6-v2"
WORDS = ["A man is eating food.", "Somebody is having a meal.", "The stock market fell today."]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(MINILM is None, reason=f"the package {made.DISTRIBUTION} is not installed"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cortex]:
    tmp: Path = tmp_path_factory.mktemp("embeddings")
    path = tmp / MODEL
    assert MINILM is not None
    path.symlink_to(MINILM)
    with cortex_up(tmp, str(path)) as command:
        yield command


@pytest.fixture(scope="module")
def client(running: Cortex) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as each:
        yield each


def cosine(one: list[float], other: list[float]) -> float:
    first, second = np.array(one), np.array(other)
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_the_greeting_tells_how_to_ask(running: Cortex):
    assert f"{MODEL:<28} loaded" in running.output
    assert "/v1/embeddings" in running.output
    assert "/v1/chat/completions" not in running.output


def test_like_texts_have_like_vectors_by_the_sdk_s_own_base64(client: OpenAI):
    found = client.embeddings.create(model=MODEL, input=WORDS)
    assert found.object == "list"
    assert found.model == MODEL
    assert [each.index for each in found.data] == [0, 1, 2]
    vectors = [each.embedding for each in found.data]
    assert all(len(each) == 384 for each in vectors)
    assert all(abs(np.linalg.norm(each) - 1) < 1e-5 for each in vectors)
    assert cosine(vectors[0], vectors[1]) > 0.5 > cosine(vectors[0], vectors[2]) + 0.2
    assert found.usage.prompt_tokens == found.usage.total_tokens == 8 + 8 + 8


def test_both_formats_and_any_batch_give_the_same_vectors(client: OpenAI):
    floats = client.embeddings.create(model=MODEL, input=WORDS, encoding_format="float")
    coded = client.embeddings.create(model=MODEL, input=WORDS, encoding_format="base64")
    for one, other in zip(floats.data, coded.data, strict=True):
        # Asked for base64 by name, the SDK leaves it as it is.
        data = base64.b64decode(other.embedding)  # type: ignore[arg-type]
        assert np.frombuffer(data, "<f4").tolist() == one.embedding
    many = [*WORDS, "word " * 200, "x"] * 20
    batch = client.embeddings.create(model=MODEL, input=many)
    assert len(batch.data) == 100
    for at, each in enumerate(batch.data):
        if at % 5 < 3:
            assert cosine(each.embedding, floats.data[at % 5].embedding) > 0.9999


def test_the_vectors_are_those_of_transformers(client: OpenAI):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    model = transformers.AutoModel.from_pretrained(MINILM).eval()
    texts = [
        *WORDS,
        "Ein Text mit Umlauten: äöü, und 漢字.",
        "CAPITALS and    spaces",
        "word " * 250,
    ]
    found = client.embeddings.create(model=MODEL, input=texts)
    for text, each in zip(texts, found.data, strict=True):
        wanted = made.reference(model, tokenizer(text)["input_ids"], "mean")
        assert cosine(each.embedding, wanted.tolist()) > 0.9999


def test_token_ids_are_taken_as_they_are(client: OpenAI):
    by_text = client.embeddings.create(model=MODEL, input="hello world").data[0].embedding
    for given in ([101, 7592, 2088, 102], [[101, 7592, 2088, 102]]):
        by_ids = client.embeddings.create(model=MODEL, input=given)  # type: ignore[arg-type]
        assert cosine(by_ids.data[0].embedding, by_text) > 0.9999
        assert by_ids.usage.prompt_tokens == 4


def test_an_over_long_text_is_a_400_that_names_its_index(client: OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input=["short", "word " * 300])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "input[1]"
    assert "256 tokens, but input[1] has 302" in str(caught.value)


def test_dimensions_are_refused_where_the_model_was_not_made_for_it(client: OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="a", dimensions=64)
    assert caught.value.param == "dimensions"
    whole = client.embeddings.create(model=MODEL, input="a", dimensions=384)
    assert len(whole.data[0].embedding) == 384


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_it_is_a_400_in_both_dialects(client: OpenAI, running: Cortex, stream: bool):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=messages, stream=stream)  # type: ignore[call-overload]
    assert caught.value.code == "model_capability"
    with Anthropic(base_url=running.url, api_key="none", max_retries=0) as other:
        with pytest.raises(anthropic.BadRequestError, match="writes no text"):
            other.messages.create(model=MODEL, max_tokens=5, messages=messages, stream=stream)  # type: ignore[call-overload]


def test_a_model_that_writes_makes_no_embeddings_cold_or_loaded(client: OpenAI):
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="cortex-tiny", input="a")
    listed = {each.id: each.model_dump() for each in client.models.list()}
    assert listed["cortex-tiny"]["status"] == "unloaded"
    assert listed["cortex-tiny"]["capabilities"] == ["text"]
    assert listed[MODEL]["capabilities"] == ["embeddings"]
    assert listed[MODEL]["max_model_len"] == 256
    client.chat.completions.create(
        model="cortex-tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
    )
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="cortex-tiny", input="a")


def test_it_is_unloaded_and_comes_back_with_the_next_request(client: OpenAI, running: Cortex):
    request = urllib.request.Request(
        f"{running.neuron_url}/models/unload", data=json.dumps({"model_id": MODEL}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
    assert len(client.embeddings.create(model=MODEL, input="again").data) == 1


def test_an_unknown_model_is_a_404_that_names_it(client: OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert caught.value.code == "model_not_found"
