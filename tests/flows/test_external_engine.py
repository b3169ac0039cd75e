"""`cortex serve` over a `cortex neuron` whose models other people's servers serve."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import torch
from anthropic import Anthropic
from openai import OpenAI, UnprocessableEntityError

from tests.support import checkpoints
from tests.support.fake_server import child_pid, requests, starts, write_script
from tests.support.processes import cortex_process, free_port

ROOT = Path(__file__).parents[2]
SLOW_SERVER = f'"{sys.executable}", "-m", "transformers.cli.transformers"'


@dataclass
class Site:
    folder: Path
    url: str
    metrics_url: str
    neuron_url: str
    neuron_pid: int


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    tmp: Path = tmp_path_factory.mktemp("external")
    model = tmp / "tiny"
    with torch.no_grad():
        checkpoints.llama(model, num_hidden_layers=2)
    checkpoints.write_tokenizer(model)
    write_script(tmp / "fake", name="its/own-name", gap_s=0.01, child=True)
    ports = [free_port() for _ in range(3)]
    (tmp / "neuron.toml").write_text(
        f"""
        host = "127.0.0.1"
        port = {ports[0]}
        [harness.torch]
        demo_models = false
        drain_s = 2
        [harness.command.models."org/fake"]
        command = ["{sys.executable}", "-m", "tests.support.fake_server", "{tmp}/fake",
          "--port", "{{port}}"]
        cwd = "{ROOT}"
        vram_mb = 50
        context = 4096
        stop_timeout_s = 5
        [harness.command.models.tiny]
        command = [{SLOW_SERVER}, "serve", "{{model}}",
          "--host", "{{host}}", "--port", "{{port}}", "--device", "cpu"]
        source = "{model}"
        env = {{ OMP_NUM_THREADS = "1", HF_HUB_OFFLINE = "1" }}
        vram_mb = 600
        context = 2048
        stop_timeout_s = 5
        """
    )
    (tmp / "cortex.toml").write_text(
        f"""
        [gateway]
        listen = "127.0.0.1:{ports[1]}"
        metrics_listen = "127.0.0.1:{ports[2]}"
        poll_s = 0.2
        cold_wait_s = 100
        [[neurons]]
        name = "host"
        endpoint = "http://127.0.0.1:{ports[0]}"
        """
    )
    (tmp / "models.toml").write_text(
        '[[models]]\nid = "org/fake"\nharness = "command"\n[aliases]\nother = "org/fake"\n'
    )
    neuron_url, url = (f"http://127.0.0.1:{port}" for port in ports[:2])
    with (
        cortex_process(tmp, neuron_url, "neuron", "-c", str(tmp / "neuron.toml")) as neuron,
        cortex_process(tmp, url, "serve", "-c", str(tmp / "cortex.toml")),
    ):
        metrics_url = f"http://127.0.0.1:{ports[2]}/metrics"
        yield Site(tmp, url, metrics_url, neuron_url, neuron.pid)


@pytest.fixture(scope="module")
def openai_client(site: Site) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=110) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic_client(site: Site) -> Iterator[Anthropic]:
    with Anthropic(base_url=site.url, api_key="none", max_retries=0, timeout=110) as client:
        yield client


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_first_request_starts_the_engine_and_is_answered(openai_client: OpenAI, site: Site):
    assert starts(site.folder / "fake") == []
    # Only the engine knows what a critic is, and it is not asked before it is loaded.
    critic = {"role": "critic", "content": "hm"}
    answer = openai_client.chat.completions.create(
        model="org/fake",
        messages=[critic, *ask("one two three")],
        extra_body={"odd": {"kept": 1}},
    )
    assert answer.choices[0].message.content == "one two three"
    assert answer.model == "org/fake"
    assert answer.usage.completion_tokens == 3
    assert len(starts(site.folder / "fake")) == 1
    assert requests(site.folder / "fake")[0]["odd"] == {"kept": 1}


def test_a_stream_under_an_alias_ends_with_the_engines_usage(openai_client: OpenAI):
    stream = openai_client.chat.completions.create(
        model="other",
        messages=ask("one two three"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "one two three "
    assert chunks[-1].usage.prompt_tokens == 7
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3


def test_text_completions_are_asked_of_it_as_well(openai_client: OpenAI):
    whole = openai_client.completions.create(model="other", prompt="one two")
    assert whole.choices[0].text == "one two"
    assert whole.model == "org/fake"
    stream = openai_client.completions.create(model="org/fake", prompt="one two", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "one two "


def test_the_anthropic_dialect_is_served_by_it_too(anthropic_client: Anthropic):
    with anthropic_client.messages.stream(
        model="org/fake", max_tokens=50, messages=ask("one two")
    ) as stream:
        assert "".join(stream.text_stream) == "one two "
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == 2
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == 7
    count = anthropic_client.messages.count_tokens(model="org/fake", messages=ask("one two"))
    assert count.input_tokens == 7


async def test_the_gateways_metrics_have_the_engines_token_counts(site: Site):
    async with aiohttp.ClientSession() as session, session.get(site.metrics_url) as reply:
        lines = (await reply.text()).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    labels = '{model="org/fake",node="host"}'
    assert float(values[f"cortex_completion_tokens_total{labels}"]) >= 8
    assert float(values[f"cortex_cold_starts_total{labels}"]) == 1


def test_an_unloaded_engine_is_gone_with_all_it_started_and_comes_back(
    openai_client: OpenAI, site: Site
):
    pids = [starts(site.folder / "fake")[-1], child_pid(site.folder / "fake")]
    openai_client.post(
        f"{site.neuron_url}/models/unload", body={"model_id": "org/fake"}, cast_to=object
    )
    assert not any(map(is_alive, pids))
    answer = openai_client.chat.completions.create(model="org/fake", messages=ask("again"))
    assert answer.choices[0].message.content == "again"


@pytest.mark.slow
def test_a_real_server_serves_a_checkpoint(openai_client: OpenAI, anthropic_client: Anthropic):
    """`transformers serve` with a tiny random model: what it says is noise, how is not."""
    answer = openai_client.chat.completions.create(
        model="tiny", messages=ask("Hello"), max_tokens=8, temperature=0
    )
    assert answer.model == "tiny"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    chunks = list(
        openai_client.chat.completions.create(
            model="tiny",
            messages=ask("Hello"),
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.model for chunk in chunks} == {"tiny"}
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    count = anthropic_client.messages.count_tokens(model="tiny", messages=ask("Hello"))
    assert count.input_tokens == answer.usage.prompt_tokens
    message = anthropic_client.messages.create(model="tiny", max_tokens=8, messages=ask("Hello"))
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 8


@pytest.mark.slow
def test_what_a_real_server_refuses_reaches_the_caller_in_its_words(openai_client: OpenAI):
    with pytest.raises(UnprocessableEntityError) as caught:
        openai_client.chat.completions.create(
            model="tiny", messages=ask("Hello"), extra_body={"no_such_field": 1}
        )
    assert "no_such_field" in caught.value.message


def test_a_killed_neuron_leaves_no_engine_behind(openai_client: OpenAI, site: Site):
    openai_client.chat.completions.create(model="org/fake", messages=ask("one"))
    pids = [starts(site.folder / "fake")[-1], child_pid(site.folder / "fake")]
    assert all(map(is_alive, pids))
    os.kill(site.neuron_pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
