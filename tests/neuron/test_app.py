import asyncio
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from cortex.core.config import Admission, DefaultModel, NeuronConfig
from cortex.core.errors import StartupError
from cortex.neuron.app import open_app
from cortex.neuron.devices import HOST
from tests.support.fake_engine import starts, write_script
from tests.support.neuron_fakes import FakeProbe, eventually
from tests.support.neuron_http import add_chat_model, chat, encode, neuron, until


async def test_a_chat_request_is_answered(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        assert (await api.load("m")).json["status"] == "loaded"
        answer = await api.post("/v1/chat/completions", chat("m", max_tokens=500))
        assert answer.status == 200
        choice = answer.json["choices"][0]
        assert "hello there" in choice["message"]["content"]
        usage = answer.json["usage"]
        assert usage["completion_tokens"] == usage["prompt_tokens"]
        assert answer.json["model"] == "m"


async def test_a_stream_begins_with_the_role_and_ends_with_usage_and_done(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        body = chat("m", max_tokens=500, stream=True, stream_options={"include_usage": True})
        answer = await api.post("/v1/chat/completions", body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = answer.events
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in events[1:-2])
        assert "hello there" in text
        assert events[-3]["choices"][0]["finish_reason"] == "stop"
        assert events[-2]["usage"]["completion_tokens"] > 0
        assert events[-1] == "[DONE]"


async def test_an_answer_without_a_bound_ends_at_the_hosts_own(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path, default_max_tokens=3) as api:
        await api.load("m")
        answer = await api.post("/v1/chat/completions", chat("m"))
        assert answer.json["usage"]["completion_tokens"] == 3
        assert answer.json["choices"][0]["finish_reason"] == "length"
        events = (await api.post("/v1/chat/completions", chat("m", stream=True))).events
        assert events[-2]["choices"][0]["finish_reason"] == "length"


async def test_several_choices_are_answered_side_by_side(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        answer = await api.post("/v1/chat/completions", chat("m", n=3, max_tokens=4))
        assert [each["index"] for each in answer.json["choices"]] == [0, 1, 2]
        assert {each["finish_reason"] for each in answer.json["choices"]} == {"length"}
        assert answer.json["usage"]["completion_tokens"] == 12


async def test_the_role_comes_at_once_and_silence_is_filled_with_comments(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=1.5)
    async with neuron(tmp_path) as api:
        await api.load("m")
        body = encode(chat("m", stream=True, max_tokens=5))
        url = api.url + "/v1/chat/completions"
        async with api.session.post(url, data=body) as reply:
            usage = await reply.content.readuntil(b"\n\n")
            assert usage.startswith(b": usage {")
            assert b'"role":"assistant"' in await reply.content.readuntil(b"\n\n")
            seen = b""
            while b": keep-alive\n\n" not in seen:
                seen += await reply.content.readany()


async def test_a_client_that_leaves_a_stream_frees_its_slot(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.01, repeat=100_000)
    async with neuron(tmp_path) as api:
        await api.load("m")
        body = encode(chat("m", stream=True, max_tokens=100_000))
        async with api.session.post(api.url + "/v1/chat/completions", data=body) as reply:
            for _ in range(3):  # the prompt's usage, the role, and the first token
                await reply.content.readuntil(b"\n\n")
            health = await api.health_of("m")
            assert (health["in_flight"], health["free_slots"]) == (1, 3)

        async def freed():
            health = await api.health_of("m")
            return (health["in_flight"], health["free_slots"]) == (0, 4)

        await until(freed)


async def test_a_client_that_leaves_a_plain_request_frees_its_slot(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.01, repeat=100_000)
    async with neuron(tmp_path) as api:
        await api.load("m")
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(
                api.post("/v1/chat/completions", chat("m", max_tokens=100_000))
            )

            async def busy():
                return (await api.health_of("m"))["free_slots"] == 3

            await until(busy)
            asking.cancel()

        async def freed():
            health = await api.health_of("m")
            return (health["in_flight"], health["free_slots"]) == (0, 4)

        await until(freed)


async def test_a_killed_engine_ends_the_stream_with_an_error_and_serves_again(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.01, repeat=100_000)
    async with neuron(tmp_path) as api:
        await api.load("m")
        body = encode(chat("m", stream=True, max_tokens=100_000))
        async with api.session.post(api.url + "/v1/chat/completions", data=body) as reply:
            await reply.content.readuntil(b"\n\n")
            write_script(path, load_s=0.5)
            os.kill(starts(path)[0], signal.SIGKILL)
            rest = await reply.read()
        last = rest.split(b"\n\n")[-2]
        assert b'"code":"engine_died"' in last
        assert b"[DONE]" not in rest

        async def recovering():
            return await api.status_of("m") == "recovering"

        await until(recovering)
        refused = await api.post("/v1/chat/completions", chat("m"))
        assert (refused.status, refused.error["code"]) == (503, "model_recovering")
        assert refused.headers["retry-after"] == "2"

        async def loaded():
            return await api.status_of("m") == "loaded"

        await until(loaded)
        assert (await api.post("/v1/chat/completions", chat("m", max_tokens=3))).status == 200


async def test_the_control_plane_answers_during_a_load(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, load_s=60)
    async with neuron(tmp_path, drain_s=0.1) as api:
        answer = await api.load("m", wait=False)
        assert answer.status == 202
        assert answer.json["status"] == "loading"
        await eventually(lambda: starts(path))

        async def in_weights():
            info = (await api.get("/models/m")).json
            return info["progress"] and info["progress"]["phase"] == "weights"

        await until(in_weights)
        info = (await api.get("/models/m")).json
        assert info["status"] == "loading"
        assert (info["progress"]["bytes_done"], info["progress"]["bytes_total"]) == (50, 100)
        assert (await api.get("/health")).status == 200
        refused = await api.post("/v1/chat/completions", chat("m"))
        assert (refused.status, refused.error["code"]) == (503, "model_loading")
        assert refused.error["progress"]["phase"] == "weights"
        assert (await api.post("/models/unload", {"model_id": "m"})).json == {
            "status": "unloaded",
            "model_id": "m",
        }


async def test_a_loader_that_disconnects_leaves_the_load_running(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, load_s=0.5)
    async with neuron(tmp_path) as api:
        async with asyncio.TaskGroup() as tasks:
            loading = tasks.create_task(api.load("m"))
            await eventually(lambda: starts(path))
            loading.cancel()
        answer = await api.load("m")
        assert answer.json["status"] == "loaded"
    assert len(starts(path)) == 1


async def test_a_full_queue_answers_503_with_retry_after(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.01, repeat=100_000)
    limits = Admission(max_in_flight=1, max_queue_depth=0)
    async with neuron(tmp_path, admission=limits) as api:
        await api.load("m")
        body = encode(chat("m", stream=True, max_tokens=100_000))
        async with api.session.post(api.url + "/v1/chat/completions", data=body) as reply:
            await reply.content.readuntil(b"\n\n")
            for stream in (True, False):
                refused = await api.post("/v1/chat/completions", chat("m", stream=stream))
                assert (refused.status, refused.error["code"]) == (503, "queue_full")
                assert refused.headers["retry-after"] == "2"


async def test_queued_requests_are_served_in_turn(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.001)
    async with neuron(tmp_path, admission=Admission(max_in_flight=1)) as api:
        await api.load("m")
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(
                    api.post("/v1/chat/completions", chat("m", max_tokens=5, stream=bool(at % 2)))
                )
                for at in range(12)
            ]
        assert [each.result().status for each in asked] == [200] * 12
        assert (await api.health_of("m"))["in_flight"] == 0


async def test_shutdown_drains_and_ends_the_engines(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
    with pytest.raises(ProcessLookupError):
        os.kill(starts(path)[0], 0)


async def test_default_models_are_loaded_at_start_and_failures_are_told(tmp_path):
    for name in ("good", "bad"):
        add_chat_model(tmp_path / "models", name)
    write_script(tmp_path / "models" / "bad", fail="unsupported_model")
    defaults = [DefaultModel(model_id=name) for name in ("bad", "good", "missing")]
    async with neuron(tmp_path, default_models=defaults) as api:

        async def ready():
            return (await api.get("/health")).json["activation"]["state"] == "ready"

        await until(ready)
        activation = (await api.get("/health")).json["activation"]
        assert activation["completed"] == ["good"]
        assert [each["model_id"] for each in activation["failed"]] == ["bad", "missing"]
        assert "scripted failure" in activation["failed"][0]["error"]


async def test_models_lists_what_could_be_served_with_its_limits(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        infos = {each["id"]: each for each in (await api.get("/models")).json}
        assert {"m", "cortex-tiny"} <= set(infos)
        assert infos["m"]["status"] == "loaded"
        assert infos["m"]["servable"] == {"ok": True, "reason": None, "detail": None}
        assert infos["m"]["limit"] == {"context": 4096}
        assert infos["m"]["tool_call"] is True
        assert infos["m"]["vram_used_mb"] >= 400
        assert infos["cortex-tiny"]["status"] == "unloaded"
        cards = (await api.get("/v1/models")).json
        assert cards["object"] == "list"
        assert {each["id"]: each["loaded"] for each in cards["data"]}["m"] is True


async def test_a_model_added_while_running_is_listed_and_served(tmp_path):
    async with neuron(tmp_path) as api:
        add_chat_model(tmp_path / "models", "late")

        async def listed():
            return "late" in [each["id"] for each in (await api.get("/models")).json]

        await until(listed)
        assert (await api.load("late")).json["status"] == "loaded"


async def test_the_endpoint_of_a_loaded_model_is_the_address_the_caller_used(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        missing = await api.get("/models/m/endpoint")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        await api.load("m")
        assert (await api.get("/models/m/endpoint")).json == {"url": api.url}


async def test_an_id_with_a_slash_has_its_own_pages(tmp_path):
    async with neuron(tmp_path) as api:
        answer = await api.get("/models/org%2Fname")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "'org/name'" in answer.error["message"]


async def test_version_and_discovery_tell_what_this_host_is(tmp_path):
    probe = FakeProbe()
    probe.free_gib = {HOST: 64.0, 0: 24.0}
    async with neuron(tmp_path, probe=probe) as api:
        version = (await api.get("/version")).json
        assert version["package_version"] == "0.2.0"
        assert version["features"][0] == "native-gdn"
        discovery = (await api.get("/discovery")).json
        assert discovery["devices"] == [
            {"index": 0, "name": "Fake 9000", "vram_total_mb": 65536, "compute_capability": ""}
        ]
        assert discovery["harnesses"] == ["torch"]
        assert discovery["memory_total_mb"] == 65536
        devices = (await api.get("/health")).json["devices"]
        assert devices[0]["vram_free_mb"] == 24576


async def test_metrics_count_requests_tokens_and_errors(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, gap_s=0.001)
    async with neuron(tmp_path) as api:
        await api.load("m")
        await api.post("/v1/chat/completions", chat("m", max_tokens=7))
        await api.post("/v1/chat/completions", chat("m", max_tokens=7, stream=True))
        await api.post("/v1/chat/completions", chat("m", "x " * 10_000))
        text = (await api.get("/metrics")).body.decode()
        assert 'cortex_neuron_requests_total{model="m"} 3.0' in text
        assert 'cortex_neuron_completion_tokens_total{model="m"} 14.0' in text
        assert (
            'cortex_neuron_request_errors_total{code="context_length_exceeded",model="m"} 1.0'
            in text
        )
        assert 'cortex_neuron_time_to_first_token_seconds_count{model="m"} 2.0' in text
        assert 'cortex_neuron_load_seconds_count{model="m"} 1.0' in text
        assert 'cortex_neuron_model_status{model="m",status="loaded"} 1.0' in text
        assert 'cortex_neuron_total_kv_blocks{model="m"} 100.0' in text
        await api.post("/models/unload", {"model_id": "m"})
        text = (await api.get("/metrics")).body.decode()
        assert 'cortex_neuron_model_status{model="m"' not in text


async def test_tokens_are_counted_without_weights(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        plain = await api.post(
            "/v1/tokenize", {"model": "m", "prompt": "hello there", "return_tokens": True}
        )
        assert plain.status == 200
        assert plain.json["count"] == len(plain.json["tokens"]) > 0
        messages = [{"role": "user", "content": "hello there"}]
        chatty = await api.post("/v1/tokenize", {"model": "m", "messages": messages})
        assert chatty.json["count"] > plain.json["count"]
        assert "tokens" not in chatty.json
        await api.load("m")
        answer = await api.post("/v1/chat/completions", chat("m", max_tokens=1))
        assert answer.json["usage"]["prompt_tokens"] == chatty.json["count"]
    assert len(starts(path)) == 1


async def test_a_model_that_does_not_fit_answers_409_with_figures(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    probe = FakeProbe()
    probe.free_gib[HOST] = 0.25
    async with neuron(tmp_path, probe=probe) as api:
        answer = await api.load("m")
        assert (answer.status, answer.error["code"]) == (409, "insufficient_memory")
        assert answer.error["free_bytes"] == 1 << 28
        assert answer.error["needed_bytes"] > 1 << 28
        assert answer.error["residents"] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "malformed_json"),
        ("POST", "/v1/chat/completions", b"{}", 400, "missing_model_field"),
        ("POST", "/v1/chat/completions", b'{"model":"m"}', 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b'{"model":"m","messages":[]}', 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b'{"model":1,"messages":[]}', 400, "invalid_request"),
        ("POST", "/v1/chat/completions", encode(chat("nothing")), 404, "model_not_found"),
        ("POST", "/v1/chat/completions", encode(chat("../m")), 404, "model_not_found"),
        ("POST", "/v1/chat/completions", encode(chat("m")), 503, "model_not_loaded"),
        ("POST", "/v1/chat/completions", b" " * ((1 << 20) + 1), 413, "body_too_large"),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed"),
        ("POST", "/models/load", b"[]", 400, "invalid_request"),
        ("POST", "/models/load", b"{}", 400, "invalid_request"),
        ("POST", "/models/load", b'{"model_id":"nothing"}', 404, "model_not_found"),
        ("POST", "/models/load", b'{"model_id":"../../etc"}', 404, "model_not_found"),
        ("POST", "/models/load", b'{"model_id":"broken"}', 422, "unreadable_checkpoint"),
        ("POST", "/models/load", b'{"model_id":"m","harness":"x"}', 400, "unsupported_field"),
        ("POST", "/models/unload", b'{"model_id":"m"}', 404, "model_not_found"),
        ("GET", "/models/nothing", None, 404, "model_not_found"),
        ("GET", "/models/../../etc/passwd", None, 404, "route_not_found"),
        ("GET", "/nowhere", None, 404, "route_not_found"),
        ("POST", "/v1/tokenize", b'{"model":"m"}', 400, "invalid_request"),
        ("POST", "/v1/tokenize", b'{"model":"x","prompt":"a"}', 404, "model_not_found"),
    ],
)
async def test_a_bad_request_gets_one_clear_error(tmp_path, method, path, body, status, code):
    add_chat_model(tmp_path / "models", "m")
    broken = tmp_path / "models" / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("not json")
    async with neuron(tmp_path, max_body_mb=1) as api:
        answer = await api.call(method, path, body)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert answer.error["message"]


async def test_a_prompt_that_is_too_long_is_refused_with_the_limit(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        for stream in (True, False):
            answer = await api.post(
                "/v1/chat/completions", chat("m", "word " * 20_000, stream=stream)
            )
            assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
            assert answer.error["max"] == 4096


async def test_without_a_state_dir_tokenizers_are_made_anew_for_this_run(tmp_path, caplog):
    path = add_chat_model(tmp_path / "models", "m")
    # One token more than tokenizer.json has, so that another one must be written.
    (path / "tokenizer_config.json").unlink()
    added = {"1536": {"content": "<|more|>", "special": True}}
    (path / "tokenizer_config.json").write_bytes(encode({"added_tokens_decoder": added}))
    (tmp_path / "state").write_text("a file where the directory should be")
    with caplog.at_level("WARNING"):
        async with neuron(tmp_path) as api:
            assert (await api.load("m")).json["status"] == "loaded"
            answer = await api.post("/v1/tokenize", {"model": "m", "prompt": "<|more|>"})
            assert answer.json["count"] == 1
    assert "state_dir cannot be written" in caplog.text


async def test_where_nothing_can_be_written_the_start_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    (tmp_path / "state").touch()
    with pytest.raises(StartupError, match=r"neither state_dir .*state. nor the temporary"):
        async with open_app(NeuronConfig(state_dir=str(tmp_path / "state")), probe=FakeProbe()):
            pass


async def test_an_error_inside_the_context_comes_out_as_itself(tmp_path):
    with pytest.raises(StartupError, match="port in use"):
        async with open_app(NeuronConfig(state_dir=str(tmp_path)), probe=FakeProbe()):
            raise StartupError("port in use")


def test_the_daemon_never_imports_torch():
    code = "import sys, cortex.neuron.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
