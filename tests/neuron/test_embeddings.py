"""Embeddings of a neuron: by our own engine, and by external ones."""

import asyncio
import base64
import os
import shutil

import numpy as np
import pytest
import torch

from cortex.core.config import CommandHarness
from cortex.neuron.app import ENGINE_COMMAND
from cortex.neuron.embeddings import WINDOW
from tests.support import checkpoints
from tests.support import embedding_checkpoints as made
from tests.support.command_engine import spec
from tests.support.fake_engine import write_script
from tests.support.fake_server import requests
from tests.support.fake_server import write_script as write_server_script
from tests.support.neuron_http import add_chat_model, chat, encode, neuron, until

PATH = "/v1/embeddings"
ENVIRONMENT = {"PYTHONPATH": os.environ.get("PYTHONPATH", ".")}
A, CLS, SEP = 4, made.CLS_ID, made.SEP_ID


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    made.tiny_encoder(path, max_tokens=32)
    return path


@pytest.fixture
def add(tmp_path, checkpoint):
    """Put the checkpoint among the models of a neuron over `tmp_path`."""

    def copied(name="e", **config):
        path = tmp_path / "models" / name
        shutil.copytree(checkpoint, path)
        checkpoints.rewrite_json(path / "config.json", **config)
        write_script(path, max_model_len=32)
        return path

    return copied


def ask(given="abc", model="e", **fields):
    return {"model": model, "input": given, **fields}


async def vectors(api, given, **fields):
    answer = await api.post(PATH, ask(given, **fields))
    assert answer.status == 200, answer.body
    assert [each["index"] for each in answer.json["data"]] == list(range(len(answer.json["data"])))
    return [each["embedding"] for each in answer.json["data"]]


async def test_an_answer_has_openai_s_form_and_the_usage_of_all_texts(tmp_path, add):
    add()
    async with neuron(tmp_path) as api:
        await api.load("e")
        answer = await api.post(PATH, ask(["abc", "b"], user="u", stream=True, x_new=1))
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json == {
            "object": "list",
            "data": [
                # [CLS], the letters, [SEP]: the fake engine's vector is first, last and number.
                {"object": "embedding", "index": 0, "embedding": [CLS, SEP, 5.0]},
                {"object": "embedding", "index": 1, "embedding": [CLS, SEP, 3.0]},
            ],
            "model": "e",
            "usage": {"prompt_tokens": 8, "total_tokens": 8},
        }
        lines = (await api.get("/metrics")).body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert values['cortex_neuron_requests_total{model="e"}'] == "1.0"
        assert values['cortex_neuron_prompt_tokens_total{model="e"}'] == "8.0"
        assert values['cortex_neuron_completion_tokens_total{model="e"}'] == "0.0"


async def test_texts_come_in_four_forms_and_ids_are_taken_as_they_are(tmp_path, add):
    add()
    async with neuron(tmp_path) as api:
        await api.load("e")
        assert await vectors(api, "ab") == [[CLS, SEP, 4]]
        assert await vectors(api, ["ab"]) == [[CLS, SEP, 4]]
        assert await vectors(api, [7, 8, 9]) == [[7, 9, 3]]
        assert await vectors(api, [[7, 8, 9], [5]]) == [[7, 9, 3], [5, 5, 1]]


async def test_base64_is_little_endian_float32(tmp_path, add):
    add()
    async with neuron(tmp_path) as api:
        await api.load("e")
        (text,) = await vectors(api, "abc", encoding_format="base64")
        assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == [CLS, SEP, 5]


async def test_many_texts_keep_their_order_over_several_windows(tmp_path, add):
    add()
    async with neuron(tmp_path) as api:
        await api.load("e")
        texts = [[at % 70] * (1 + at % 30) for at in range(3 * WINDOW + 5)]
        wanted = [[float(ids[0]), float(ids[0]), float(len(ids))] for ids in texts]
        assert await vectors(api, texts) == wanted


async def test_vectors_are_cut_down_and_normalised_where_the_model_says_so(tmp_path, add):
    add("e", is_matryoshka=True)
    add("some", matryoshka_dimensions=[2])
    add("plain")
    async with neuron(tmp_path) as api:
        for name in ("e", "some", "plain"):
            await api.load(name)
        for name in ("e", "some"):
            for form in ("float", "base64"):
                (found,) = await vectors(
                    api, [[3, 4]], model=name, dimensions=2, encoding_format=form
                )
                if form == "base64":
                    found = np.frombuffer(base64.b64decode(found), "<f4").tolist()
                assert found == pytest.approx([0.6, 0.8])
        for name, dimensions in (("some", 1), ("plain", 2), ("e", 49)):
            answer = await api.post(PATH, ask(model=name, dimensions=dimensions))
            assert (answer.status, answer.error["param"]) == (400, "dimensions")
            assert answer.error["code"] == "unsupported_field"
            assert "48 numbers" in answer.error["message"]
        assert await vectors(api, "a", model="plain", dimensions=48) == [[CLS, SEP, 3]]


async def test_what_is_refused_names_its_field_and_its_index(tmp_path, add):
    add()
    async with neuron(tmp_path) as api:
        await api.load("e")
        for fields, param, code in (
            ({"input": []}, "input", "invalid_request"),
            ({"input": ""}, "input", "invalid_request"),
            ({"input": ["a", ""]}, "input[1]", "invalid_request"),
            ({"input": [[1], []]}, "input[1]", "invalid_request"),
            ({"input": ["a", 1]}, "input", "invalid_request"),
            ({"input": ["a"] * 2049}, "input", "invalid_request"),
            ({"input": [[1], [80]]}, "input[1]", "invalid_request"),
            ({"input": [-1]}, "input", "invalid_request"),
            ({"input": "a" * 31}, "input", "context_length_exceeded"),
            ({"input": ["a", "b", "a" * 31]}, "input[2]", "context_length_exceeded"),
            ({"input": ["a", "a" * 100_000]}, "input[1]", "context_length_exceeded"),
            ({"input": [[1] * 33]}, "input[0]", "context_length_exceeded"),
            ({"encoding_format": "int8"}, "encoding_format", "invalid_request"),
            ({"dimensions": 0}, "dimensions", "invalid_request"),
        ):
            answer = await api.post(PATH, {**ask(), **fields})
            assert answer.status == 400, fields
            error = answer.error
            assert (error["param"], error["code"]) == (param, code), fields
        too_long = (await api.post(PATH, ask(["a", "a" * 31]))).error
        assert "maximum context length is 32 tokens, but input[1] has 33" in too_long["message"]
        assert (too_long["index"], too_long["max"]) == (1, 32)
        missing = await api.post(PATH, {"input": "a"})
        assert (missing.status, missing.error["code"]) == (400, "missing_model_field")
        assert await vectors(api, "a" * 30) == [[CLS, SEP, 32]]


async def test_an_answer_that_would_be_too_large_is_refused_before_any_work(tmp_path, add):
    # 2048 vectors of 2048 numbers are too many in decimal and fit in base64.
    add("e", hidden_size=2048)
    async with neuron(tmp_path) as api:
        # Facts are read from shapes that do not matter to a fake engine.
        assert (await api.load("e")).status == 200
        answer = await api.post(PATH, ask([[5]] * 2048))
        assert (answer.status, answer.error["param"]) == (400, "input")
        assert "base64" in answer.error["message"]
        assert len(await vectors(api, [[5]] * 2048, encoding_format="base64")) == 2048


async def test_each_kind_of_model_refuses_what_the_other_is_for(tmp_path, add):
    add()
    add_chat_model(tmp_path / "models", "c")
    async with neuron(tmp_path) as api:
        await api.load("e")
        await api.load("c")
        asked = [
            ("/v1/chat/completions", chat("e"), "writes no text; ask /v1/embeddings"),
            ("/v1/chat/completions", chat("e", stream=True), "writes no text"),
            ("/v1/completions", {"model": "e", "prompt": "a"}, "writes no text"),
            (PATH, ask(model="c"), "makes no embeddings"),
        ]
        for path, body, words in asked:
            answer = await api.post(path, body)
            assert (answer.status, answer.error["code"]) == (400, "model_capability"), body
            assert answer.error["param"] == "model"
            assert words in answer.error["message"]
        infos = {each["id"]: each for each in (await api.get("/models")).json}
        assert infos["e"]["capabilities"] == ["embeddings"]
        assert infos["e"]["limit"]["context"] == 32
        assert infos["c"]["capabilities"] == ["text"]
        cards = {each["id"]: each for each in (await api.get("/v1/models")).json["data"]}
        assert cards["e"]["capabilities"] == ["embeddings"]
        counted = {"model": "e", "prompt": "abc", "return_tokens": True}
        assert (await api.post("/v1/tokenize", counted)).json["count"] == 3
        assert (await api.post(PATH, ask(model="none"))).status == 404


async def test_a_caller_who_leaves_takes_what_was_not_begun_out_of_the_engine(tmp_path, add):
    path = add()
    write_script(path, gap_s=0.05)
    async with neuron(tmp_path) as api:
        await api.load("e")
        body = encode(ask([[5]] * 2000))
        request = asyncio.get_running_loop().create_task(
            api.session.post(api.url + PATH, data=body)
        )

        async def is_busy():
            return (await api.health_of("e"))["in_flight"]

        async def is_idle():
            health = await api.health_of("e")
            return (health["in_flight"], health["free_slots"]) == (0, 4)

        await until(is_busy)
        request.cancel()
        # Two thousand steps of 50 ms would outlast this wait by far.
        await until(is_idle)


async def test_an_engine_that_dies_over_a_text_is_a_502_and_comes_back(tmp_path, add):
    path = add()
    write_script(path, die_on_id=66)
    async with neuron(tmp_path) as api:
        await api.load("e")
        answer = await api.post(PATH, ask([[5], [66]]))
        assert (answer.status, answer.error["code"]) == (502, "engine_died")

        async def is_back():
            return (await api.post(PATH, ask())).status == 200

        await until(is_back)


async def test_an_encoder_without_its_files_is_listed_with_what_it_lacks(tmp_path, add):
    (add() / "modules.json").unlink()
    async with neuron(tmp_path) as api:
        answer = await api.load("e")
        assert (answer.status, answer.error["code"]) == (422, "unreadable_checkpoint")
        assert "modules.json is missing" in answer.error["message"]


@pytest.mark.slow
async def test_the_real_engine_serves_an_encoder_and_a_decoder(tmp_path, checkpoint, add):
    add()
    decoder = tmp_path / "models" / "d"
    model = made.tiny_decoder(decoder)
    encoder = made.encoder(tmp_path / "again")
    async with neuron(tmp_path, engine_command=ENGINE_COMMAND) as api:
        for name in ("e", "d"):
            loaded = await api.load(name)
            assert loaded.status == 200, loaded.body
        texts = [[5, 6, 7], [8], list(range(4, 36)), [9, 9]]
        for name, reference, pooling in (("e", encoder, "mean"), ("d", model, "last")):
            for ids, found in zip(texts, await vectors(api, texts, model=name), strict=True):
                wanted = made.reference(reference, ids, pooling)
                torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-3)
        word = await vectors(api, "hello")
        ids = (
            await api.post("/v1/tokenize", {"model": "e", "prompt": "hello", "return_tokens": True})
        ).json["tokens"]
        wanted = made.reference(encoder, [CLS, *ids, SEP], "mean")
        torch.testing.assert_close(torch.tensor(word[0]), wanted, atol=1e-4, rtol=1e-3)
        # Loaded, it holds memory like any model, and gives it back.
        info = (await api.get("/models/e")).json
        assert info["need_bytes"] > info["weight_bytes"] > 0
        assert (await api.post("/models/unload", {"model_id": "e"})).status == 200
        assert await api.status_of("e") == "unloaded"


async def test_an_external_engine_is_asked_at_its_own_route(tmp_path):
    write_server_script(tmp_path / "fake", name="its/own-name")
    command = CommandHarness(
        models={"org/e": spec(tmp_path / "fake", env=ENVIRONMENT, capabilities=["embeddings"])}
    )
    async with neuron(tmp_path, command=command) as api:
        await api.load("org/e")
        answer = await api.post(
            PATH, ask(["abc", "b"], "org/e", user=None, input_type="query", stream=True)
        )
        assert answer.status == 200, answer.body
        assert answer.json == {
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [3.0, 0.25]},
                {"object": "embedding", "index": 1, "embedding": [1.0, 0.25]},
            ],
            "model": "org/e",
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
        }
        (sent,) = requests(tmp_path / "fake")
        sent.pop("headers")
        assert sent == {
            "model": "its/own-name",
            "input": ["abc", "b"],
            "input_type": "query",
            "stream": True,
        }
        infos = {each["id"]: each for each in (await api.get("/models")).json}
        assert infos["org/e"]["capabilities"] == ["embeddings"]


async def test_an_external_engine_that_makes_none_says_so_itself(tmp_path):
    error = {"error": {"message": "this model has no embeddings", "code": 400}}
    write_server_script(tmp_path / "fake", status=400, error=error)
    command = CommandHarness(models={"m": spec(tmp_path / "fake", env=ENVIRONMENT)})
    async with neuron(tmp_path, command=command) as api:
        await api.load("m")
        answer = await api.post(PATH, ask(model="m"))
        assert answer.status == 400
        assert "no embeddings" in answer.error["message"]
