import asyncio
import os
import signal
from contextlib import asynccontextmanager

import msgspec
import pytest

from cortex.core.config import Admission, CommandHarness, DefaultModel, HarnessName
from cortex.core.openai import read_usage_comment
from cortex.neuron import residency
from cortex.neuron.command import engine as engine_module
from tests.support.command_engine import spec
from tests.support.fake_server import child_pid, requests, starts, write_script
from tests.support.neuron_fakes import FakeProbe, eventually
from tests.support.neuron_http import add_chat_model, chat, encode, neuron, until

CHAT = "/v1/chat/completions"
ENVIRONMENT = {"PYTHONPATH": os.environ.get("PYTHONPATH", ".")}


@asynccontextmanager
async def served(tmp_path, *, probe=None, settings=None, drain_s=10.0, **fields):
    """A neuron that serves `org/m` by the fake server in `tmp_path/fake`."""
    model = spec(tmp_path / "fake", env=ENVIRONMENT, **fields)
    command = CommandHarness(models={"org/m": model}, **(settings or {}))
    async with neuron(tmp_path, command=command, probe=probe, drain_s=drain_s) as api:
        yield api


async def loaded(api):
    answer = await api.load("org/m")
    assert answer.status == 200, answer.body
    return answer


def text_of(events):
    chunks = [each for each in events if each != "[DONE]" and each["choices"]]
    return "".join(each["choices"][0]["delta"].get("content", "") for each in chunks)


def comments_of(answer):
    lines = answer.body.split(b"\n\n")
    return [told for told in map(read_usage_comment, lines) if told is not None]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_configured_model_is_listed_before_it_is_loaded(tmp_path):
    async with served(tmp_path, context=2048, tool_call=True, reasoning=False) as api:
        info = (await api.get("/models/org/m")).json
        assert info["harness"] == "command"
        assert info["status"] == "unloaded"
        assert info["limit"] == {"context": 2048}
        assert info["need_bytes"] == 100 << 20
        assert (info["tool_call"], info["reasoning"]) == (True, False)
        assert "org/m" in [each["id"] for each in (await api.get("/v1/models")).json["data"]]
        assert (await api.get("/discovery")).json["harnesses"] == ["command", "torch"]
        answer = await api.post(CHAT, chat("org/m"))
        assert (answer.status, answer.error["code"]) == (503, "model_not_loaded")


async def test_a_chat_is_answered_under_our_name_of_the_model_with_the_engines_usage(tmp_path):
    write_script(tmp_path / "fake", name="its/own-name")
    async with served(tmp_path) as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m", "one two three", odd_field={"kept": [1]}))
        assert answer.status == 200
        assert answer.json["model"] == "org/m"
        assert answer.json["choices"][0]["message"]["content"] == "one two three"
        assert answer.json["choices"][0]["own_field"] == [1, 2]
        assert answer.json["usage"]["completion_tokens"] == 3
        sent = requests(tmp_path / "fake")[0]
        assert sent["model"] == "its/own-name"
        assert sent["odd_field"] == {"kept": [1]}
        assert "stream_options" not in sent


@pytest.mark.parametrize("usage_in", ["own", "last"])
async def test_a_stream_hides_the_usage_that_the_caller_did_not_ask_for(tmp_path, usage_in):
    write_script(tmp_path / "fake", name="its/own-name", usage_in=usage_in)
    async with served(tmp_path) as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m", "one two three", stream=True))
        events = answer.events
        assert events[-1] == "[DONE]"
        assert text_of(events) == "one two three "
        assert {each["model"] for each in events[:-1]} == {"org/m"}
        assert all("usage" not in each and each["choices"] for each in events[:-1])
        assert [(each.prompt_tokens, each.completion_tokens) for each in comments_of(answer)] == [
            (7, 3)
        ]
        assert requests(tmp_path / "fake")[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("usage_in", ["own", "last"])
async def test_a_caller_that_asks_for_usage_gets_it_in_a_chunk_of_its_own(tmp_path, usage_in):
    write_script(tmp_path / "fake", usage_in=usage_in)
    async with served(tmp_path) as api:
        await loaded(api)
        options = {"include_usage": True}
        answer = await api.post(CHAT, chat("org/m", "one", stream=True, stream_options=options))
        last = answer.events[-2]
        assert last["choices"] == []
        assert last["model"] == "org/m"
        assert last["object"] == "chat.completion.chunk"
        assert last["usage"] == {
            "prompt_tokens": 7,
            "completion_tokens": 1,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 3},
        }


async def test_an_engine_that_can_is_asked_for_the_prompts_count_with_the_first_chunk(tmp_path):
    async with served(tmp_path, continuous_usage=True) as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m", "one two", stream=True))
        assert [each.completion_tokens for each in comments_of(answer)] == [1, 2]
        assert answer.body.index(b": usage") < answer.body.index(b"one ")
        assert all("usage" not in each for each in answer.events[:-1])


async def test_the_id_of_a_request_reaches_the_engine(tmp_path):
    async with served(tmp_path) as api:
        await loaded(api)
        headers = {"x-request-id": "abc", "authorization": "Bearer secret"}
        await api.call("POST", CHAT, chat("org/m"), headers=headers)
        assert requests(tmp_path / "fake")[0]["headers"] == {"x-request-id": "abc"}


async def test_an_engine_that_ends_a_finished_stream_without_done_is_helped_out(tmp_path):
    write_script(tmp_path / "fake", done=False)
    async with served(tmp_path) as api:
        await loaded(api)
        assert (await api.post(CHAT, chat("org/m", stream=True))).events[-1] == "[DONE]"


async def test_a_stream_that_breaks_off_ends_in_an_error_and_not_in_done(tmp_path):
    write_script(tmp_path / "fake", break_off=True)
    async with served(tmp_path) as api:
        await loaded(api)
        events = (await api.post(CHAT, chat("org/m", "one two", stream=True))).events
        assert text_of(events[:-1]) == "one "
        assert events[-1]["error"]["code"] == "engine_died"


async def test_the_metrics_have_the_engines_own_token_counts(tmp_path):
    write_script(tmp_path / "fake", gap_s=0.2)
    async with served(tmp_path) as api:
        await loaded(api)
        await api.post(CHAT, chat("org/m", "one two", stream=True))
        await api.post(CHAT, chat("org/m", "one two three"))
        lines = (await api.get("/metrics")).body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        label = '{model="org/m"}'
        assert values[f"cortex_neuron_requests_total{label}"] == "2.0"
        assert values[f"cortex_neuron_prompt_tokens_total{label}"] == "14.0"
        assert values[f"cortex_neuron_completion_tokens_total{label}"] == "5.0"
        assert values[f"cortex_neuron_cached_prompt_tokens_total{label}"] == "6.0"
        assert (await api.health_of("org/m"))["tok_s_decode"] > 0


async def test_silence_is_filled_with_comments(tmp_path):
    write_script(tmp_path / "fake", mute_s=1.5)
    async with served(tmp_path) as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m", stream=True))
        assert b": keep-alive\n\n" in answer.body
        assert b": hello" not in answer.body


async def test_an_engine_that_sends_no_first_token_is_given_up(tmp_path):
    write_script(tmp_path / "fake", mute_s=60.0)
    async with served(tmp_path, settings={"first_token_s": 0.3}) as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m", stream=True))
        assert answer.events[-1]["error"]["code"] == "upstream_connection_error"
        assert "sent no token for 0.3 s" in answer.events[-1]["error"]["message"]


async def test_an_engine_that_stalls_between_two_tokens_is_given_up(tmp_path):
    write_script(tmp_path / "fake", gap_s=0.2)
    async with served(tmp_path, settings={"stall_s": 0.05}) as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m", "one two", stream=True))
        assert text_of(answer.events[:-1]) == "one "
        assert "sent no token for 0.05 s" in answer.events[-1]["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_seen_by_the_engine(tmp_path, stream):
    write_script(tmp_path / "fake", gap_s=0.02)
    async with served(tmp_path) as api:
        await loaded(api)
        body = encode(chat("org/m", "word " * 10_000, stream=stream))
        call = api.session.post(api.url + CHAT, data=body)
        if stream:
            async with call as reply:
                await reply.content.readany()
            await eventually(lambda: (tmp_path / "fake" / "left").exists())
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await call

        async def idle():
            return (await api.health_of("org/m"))["in_flight"] == 0

        await until(idle)


async def test_more_requests_than_seats_wait_and_more_than_that_are_refused(tmp_path):
    write_script(tmp_path / "fake", gap_s=0.05)
    limits = {"admission": Admission(max_queue_depth=1)}
    async with served(tmp_path, settings=limits, max_in_flight=2) as api:
        await loaded(api)
        answers = []

        async def ask():
            answers.append((await api.post(CHAT, chat("org/m", "a b c d e f g h"))).status)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(ask())
        assert sorted(answers) == [200, 200, 200, 503]
        health = await api.health_of("org/m")
        assert health["max_in_flight"] == 2
        assert health["rejected_queue_full"] == 1


@pytest.mark.parametrize(
    ("status", "error", "becomes", "code", "says"),
    [
        (
            400,
            {"error": {"message": "bad temperature", "code": 400, "param": "temperature"}},
            400,
            "invalid_request",
            "the engine of model 'org/m' says: bad temperature",
        ),
        (
            400,
            {"object": "error", "message": "maximum context length is 4096 tokens"},
            400,
            "context_length_exceeded",
            "maximum context length",
        ),
        (422, {"detail": "Unexpected fields"}, 422, "invalid_request", "Unexpected fields"),
        (401, {"error": {"message": "no key"}}, 502, "upstream_malformed_response", "no key"),
        (429, {"error": "busy"}, 503, "queue_full", "busy"),
        (503, {"error": {"message": "loading"}}, 503, "service_unavailable", "loading"),
        (500, "oops", 502, "engine_error", "oops"),
    ],
)
async def test_an_engines_refusal_keeps_its_words_and_says_whose_fault_it_is(
    tmp_path, status, error, becomes, code, says
):
    write_script(tmp_path / "fake", status=status, error=error)
    async with served(tmp_path) as api:
        await loaded(api)
        for stream in (False, True):
            answer = await api.post(CHAT, chat("org/m", stream=stream))
            assert answer.status == becomes
            assert answer.error["code"] == code
            assert says in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_that_may_be_longer_than_the_room_fills_the_room(tmp_path, stream, field):
    write_script(tmp_path / "fake", room=100)
    async with served(tmp_path) as api:
        await loaded(api)
        fitting = await api.post(CHAT, chat("org/m", "one two", stream=stream, **{field: 98}))
        assert fitting.status == 200
        answer = await api.post(CHAT, chat("org/m", "one two", stream=stream, **{field: 32000}))
        assert answer.status == 200
        sent = [each.get(field) for each in requests(tmp_path / "fake")]
        assert sent == [98, 32000, None]
        too_long = " ".join(["word"] * 101)
        refused = await api.post(CHAT, chat("org/m", too_long, stream=stream, **{field: 5}))
        assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
        unbounded = await api.post(CHAT, chat("org/m", too_long, stream=stream))
        assert unbounded.status == 400
        assert len(requests(tmp_path / "fake")) == 6


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_without_a_bound_gets_the_models_own(tmp_path, stream):
    async with served(tmp_path, default_max_tokens=50) as api:
        await loaded(api)
        await api.post(CHAT, chat("org/m", stream=stream))
        await api.post(CHAT, chat("org/m", stream=stream, max_completion_tokens=7))
        await api.post(CHAT, chat("org/m", stream=stream, max_tokens=9))
        await api.post("/v1/completions", {"model": "org/m", "prompt": "x", "stream": stream})
        sent = requests(tmp_path / "fake")
        assert [each.get("max_tokens") for each in sent] == [50, None, 9, None]
        assert [each.get("max_completion_tokens") for each in sent] == [None, 7, None, None]


async def test_a_name_that_the_engine_does_not_know_is_not_taken_for_an_evicted_model(tmp_path):
    write_script(tmp_path / "fake", name="its/own-name")
    async with served(tmp_path, upstream_model="wrong") as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m"))
        assert (answer.status, answer.error["code"]) == (502, "upstream_malformed_response")
        assert "check `upstream_model`" in answer.error["message"]


async def test_a_crash_ends_the_stream_in_words_and_the_engine_is_started_again(tmp_path):
    write_script(tmp_path / "fake", die_on="poison")
    async with served(tmp_path) as api:
        await loaded(api)
        events = (await api.post(CHAT, chat("org/m", "one poison", stream=True))).events
        assert events[-1]["error"]["code"] == "engine_died"

        async def again():
            return (await api.post(CHAT, chat("org/m", "one"))).status == 200

        await until(again)
        assert len(starts(tmp_path / "fake")) == 2
        assert (await api.get("/models/org/m")).json["status"] == "loaded"


async def test_an_engine_that_keeps_crashing_is_failed_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(residency, "RESTART_PAUSES_S", (0.0, 0.0, 0.0))
    async with served(tmp_path) as api:
        await loaded(api)
        write_script(tmp_path / "fake", die_starts=1000)
        os.kill(starts(tmp_path / "fake")[0], signal.SIGKILL)

        async def failed():
            return await api.status_of("org/m") == "failed"

        await until(failed)
        assert len(starts(tmp_path / "fake")) == 4
        info = (await api.get("/models/org/m")).json
        assert "ended with exit code 3" in info["error"]
        assert "out of luck: no such weights" in info["error"]
        answer = await api.post(CHAT, chat("org/m"))
        assert answer.error["code"] == "load_failed"
        assert "out of luck" in answer.error["message"]


async def test_a_hung_engine_is_ended_and_served_again(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "HEALTH_LIMIT_S", 0.1)
    write_script(tmp_path / "fake", hang_on="freeze")
    async with served(tmp_path, hang_s=0.5) as api:
        await loaded(api)
        answer = await api.post(CHAT, chat("org/m", "freeze"))
        assert (answer.status, answer.error["code"]) == (502, "engine_died")

        async def again():
            return (await api.post(CHAT, chat("org/m", "one"))).status == 200

        await until(again)


async def test_unloading_lets_requests_end_and_leaves_no_process(tmp_path):
    write_script(tmp_path / "fake", gap_s=0.1, child=True)
    async with served(tmp_path) as api:
        await loaded(api)
        pids = [*starts(tmp_path / "fake"), child_pid(tmp_path / "fake")]
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(api.post(CHAT, chat("org/m", "a b c d e", stream=True)))
            await eventually(lambda: requests(tmp_path / "fake"))
            assert (await api.post("/models/unload", {"model_id": "org/m"})).status == 200
        assert asking.result().events[-1] == "[DONE]"
        assert not any(map(is_alive, pids))
        assert await api.status_of("org/m") == "unloaded"


async def test_requests_that_outlast_the_drain_are_cut_off_in_words(tmp_path):
    write_script(tmp_path / "fake", gap_s=0.05, stubborn=True)
    async with served(tmp_path, drain_s=0.2, stop_timeout_s=0.2) as api:
        await loaded(api)
        async with asyncio.TaskGroup() as tasks:
            streaming = tasks.create_task(
                api.post(CHAT, chat("org/m", "word " * 1000, stream=True))
            )
            whole = tasks.create_task(api.post(CHAT, chat("org/m", "word " * 1000)))
            await eventually(lambda: len(requests(tmp_path / "fake")) == 2)
            await api.post("/models/unload", {"model_id": "org/m"})
        assert streaming.result().events[-1]["error"]["code"] == "model_unloading"
        assert (whole.result().status, whole.result().error["code"]) == (503, "model_unloading")


async def test_a_recycled_engine_is_a_new_process_and_requests_wait_for_it(tmp_path):
    async with served(tmp_path) as api:
        await loaded(api)
        write_script(tmp_path / "fake", start_s=0.5)
        async with asyncio.TaskGroup() as tasks:
            recycling = tasks.create_task(api.post("/models/recycle", {"model_id": "org/m"}))
            await eventually(lambda: len(starts(tmp_path / "fake")) == 2)
            answer = await api.post(CHAT, chat("org/m", "still here"))
        assert recycling.result().status == 200
        assert answer.json["choices"][0]["message"]["content"] == "still here"
        assert not is_alive(starts(tmp_path / "fake")[0])


async def test_a_load_that_cannot_start_tells_its_caller_why(tmp_path):
    write_script(tmp_path / "fake", die_starts=1)
    async with served(tmp_path) as api:
        answer = await api.load("org/m")
        assert (answer.status, answer.error["code"]) == (503, "load_failed")
        assert "out of luck: no such weights" in answer.error["message"]
        assert await api.status_of("org/m") == "failed"


async def test_memory_is_claimed_as_the_operator_says_and_refused_where_it_is_not_there(tmp_path):
    probe = FakeProbe()
    probe.free_gib |= {0: 4.0, 1: 9.0}
    async with served(tmp_path, probe=probe, vram_mb=8192) as api:
        await loaded(api)
        info = (await api.get("/models/org/m")).json
        assert (info["devices"], info["vram_used_mb"]) == ([1], 8192)
        await api.post("/models/unload", {"model_id": "org/m"})
        probe.free_gib[1] = 5.0
        answer = await api.load("org/m")
        assert (answer.status, answer.error["code"]) == (409, "insufficient_memory")
        assert answer.error["needed_bytes"] == 8192 << 20


async def test_a_model_over_two_gpus_is_claimed_on_both(tmp_path):
    probe = FakeProbe()
    probe.free_gib |= {0: 9.0, 1: 9.0}
    async with served(tmp_path, probe=probe, vram_mb=8192, num_devices=2) as api:
        await loaded(api)
        info = (await api.get("/models/org/m")).json
        assert (info["devices"], info["vram_used_mb"]) == ([0, 1], 16384)
        answer = await api.load("org/m", tensor_parallel=2)
        assert answer.status == 200
        answer = await api.load("org/m", tensor_parallel=4)
        assert (answer.status, answer.error["param"]) == (400, "tensor_parallel")


@pytest.mark.parametrize(
    ("option", "value"),
    [("source", "hf:org/other"), ("quant", "q4"), ("max_model_len", 100), ("max_model_len", 0)],
)
async def test_what_only_the_command_can_say_is_refused_in_a_load(tmp_path, option, value):
    async with served(tmp_path) as api:
        answer = await api.load("org/m", **{option: value})
        assert (answer.status, answer.error["param"]) == (400, option)


async def test_a_command_from_the_network_is_refused_unless_it_is_allowed(tmp_path):
    command = msgspec.to_builtins(spec(tmp_path / "fake"))
    async with neuron(tmp_path, command=CommandHarness(allow_remote_commands=False)) as api:
        answer = await api.load("other", command=command)
        assert answer.status == 400
    async with served(tmp_path) as api:
        answer = await api.load("other", command=command)
        assert (answer.status, answer.error["param"]) == (400, "command")
        assert "allow_remote_commands" in answer.error["message"]
    assert starts(tmp_path / "fake") == []


async def test_a_command_from_the_network_is_run_where_that_is_allowed(tmp_path):
    command = msgspec.to_builtins(spec(tmp_path / "fake", env=ENVIRONMENT))
    async with neuron(tmp_path, command=CommandHarness(allow_remote_commands=True)) as api:
        assert (await api.load("other", command=command)).status == 200
        answer = await api.post(CHAT, chat("other", "one"))
        assert answer.json["model"] == "other"
        await api.post("/models/unload", {"model_id": "other"})
        assert (await api.get("/models/other")).status == 404
        bad = {**command, "command": "serve it"}
        answer = await api.load("other", command=bad)
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        assert "{port} is missing" in answer.error["message"]


async def test_a_model_without_a_command_says_where_to_put_one(tmp_path):
    async with served(tmp_path) as api:
        answer = await api.load("other", harness="command")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert '[harness.command.models."other"]' in answer.error["message"]


async def test_our_own_engine_serves_beside_an_external_one(tmp_path):
    add_chat_model(tmp_path / "models", "ours")
    async with served(tmp_path) as api:
        await loaded(api)
        await api.load("ours")
        answer = await api.post(CHAT, chat("ours", "hello there", max_tokens=500))
        assert "hello there" in answer.json["choices"][0]["message"]["content"]
        assert (await api.get("/models/ours")).json["harness"] == "torch"


async def test_a_host_of_external_engines_alone_serves_nothing_of_its_own(tmp_path):
    add_chat_model(tmp_path / "models", "ours")
    kinds = [HarnessName(name="command")]
    command = CommandHarness(models={"org/m": spec(tmp_path / "fake", env=ENVIRONMENT)})
    async with neuron(tmp_path, command=command, harnesses=kinds) as api:
        assert [each["id"] for each in (await api.get("/models")).json] == ["org/m"]
        assert (await api.get("/discovery")).json["harnesses"] == ["command"]
        assert (await api.load("ours")).status == 404
        answer = await api.load("org/m", harness="torch")
        assert (answer.status, answer.error["param"]) == (400, "harness")
        await loaded(api)
        assert (await api.post(CHAT, chat("org/m", "one"))).status == 200
        assert (await api.post(CHAT, chat("ours"))).status == 404


async def test_tokens_are_counted_by_the_engine(tmp_path):
    write_script(tmp_path / "fake", tokenize=True)
    async with served(tmp_path) as api:
        await loaded(api)
        body = {"model": "org/m", "messages": [{"role": "user", "content": "a b c"}]}
        answer = await api.post("/v1/tokenize", body)
        assert answer.json == {"count": 3, "max_model_len": 4096}
        answer = await api.post(
            "/v1/tokenize", {"model": "org/m", "prompt": "a b", "return_tokens": True}
        )
        assert answer.json["tokens"] == [0, 1]
        assert requests(tmp_path / "fake") == []


async def test_an_engine_without_tokenize_counts_by_one_token_of_an_answer(tmp_path):
    async with served(tmp_path) as api:
        await loaded(api)
        body = {"model": "org/m", "messages": [{"role": "user", "content": "a b c"}]}
        assert (await api.post("/v1/tokenize", body)).json == {"count": 7}
        assert requests(tmp_path / "fake")[0]["max_tokens"] == 1
        answer = await api.post("/v1/tokenize", {"model": "org/m", "prompt": "a b"})
        assert (answer.status, answer.error["param"]) == (400, "prompt")


async def test_an_external_model_can_be_loaded_at_the_start(tmp_path):
    command = CommandHarness(models={"org/m": spec(tmp_path / "fake", env=ENVIRONMENT)})
    default = DefaultModel(model_id="org/m", harness="command")
    async with neuron(tmp_path, command=command, default_models=[default]) as api:

        async def is_loaded():
            return await api.status_of("org/m") == "loaded"

        await until(is_loaded)
        assert (await api.get("/health")).json["activation"]["completed"] == ["org/m"]


async def test_one_external_engine_makes_room_for_another(tmp_path):
    models = {name: spec(tmp_path / name, env=ENVIRONMENT, vram_mb=3000) for name in ("old", "new")}
    probe = FakeProbe()
    probe.free_gib[0] = 4.0
    async with neuron(tmp_path, command=CommandHarness(models=models), probe=probe) as api:
        assert (await api.load("old")).status == 200
        probe.free_gib[0] = 1.0
        refused = await api.load("new")
        assert (refused.status, refused.error["code"]) == (409, "insufficient_memory")
        assert [each["id"] for each in refused.error["residents"]] == ["old"]
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(api.load("new", evict=["old"]))
            await eventually(lambda: not is_alive(starts(tmp_path / "old")[0]))
            probe.free_gib[0] = 4.0
        assert loading.result().json["evicted"] == ["old"]
        assert await api.status_of("new") == "loaded"
        assert await api.status_of("old") == "unloaded"


async def test_a_neuron_that_ends_ends_its_engines(tmp_path):
    write_script(tmp_path / "fake", child=True)
    async with served(tmp_path) as api:
        await loaded(api)
        pids = [*starts(tmp_path / "fake"), child_pid(tmp_path / "fake")]
    assert not any(map(is_alive, pids))
