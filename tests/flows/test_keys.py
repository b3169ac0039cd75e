"""A closed fleet: hashed keys with limits in front, a secret and certificates behind."""

import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import msgspec
import openai
import pytest

from cortex.core.trust import Trust, client_context
from tests.support.certificates import Authority
from tests.support.processes import cortex_process, free_port, run_cortex

SECRET = "correct-horse-battery-staple"
MODEL = "cortex-tiny"
ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 8,
    "messages": [{"role": "user", "content": "Who are you?"}],
}


@dataclass
class Closed:
    url: str
    neuron_url: str
    neuron_pid: int
    keys: dict[str, str]
    folder: Path
    tls: ssl.SSLContext


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    tmp: Path = tmp_path_factory.mktemp("closed")
    neuron_port, port, metrics_port = (free_port() for _ in range(3))
    url, neuron_url = f"http://127.0.0.1:{port}", f"https://127.0.0.1:{neuron_port}"
    authority = Authority(tmp, "fleet")
    authority.issue("neuron")
    cert, cert_key = authority.issue("gateway")
    (tmp / "neuron.toml").write_text(
        f'host = "127.0.0.1"\nport = {neuron_port}\n{certificates("neuron")}'
        f'[[default_models]]\nmodel_id = "{MODEL}"\n'
        "[harness.torch]\ndemo_models = false\n"
    )
    text = (
        f'fleet_secret_file = "secret"\n{certificates("gateway")}[gateway]\n'
        f'listen = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\npoll_s = 0.2\n'
        f'[[neurons]]\nname = "only"\nendpoint = "{neuron_url}"\n'
        "[entitlements]\nrequire_auth = true\n"
    )
    keys = {}
    for name, limits in (("ample", "tokens_per_day = 100000"), ("spent", "hard_cap = 10")):
        made = run_cortex(tmp, "keys", "new", "alice", "--id", name)
        keys[name] = next(each for each in made.stderr.splitlines() if each.startswith("sk-"))
        text += f"{made.stdout}{limits}\n"
    (tmp / "secret").write_text(SECRET + "\n")
    (tmp / "cortex.toml").write_text(text)
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("NEURON_FLEET_SECRET", SECRET)
            config = str(tmp / "neuron.toml")
            neuron = stack.enter_context(cortex_process(tmp, neuron_url, "neuron", "-c", config))
        stack.enter_context(cortex_process(tmp, url, "serve", "-c", str(tmp / "cortex.toml")))
        tls = client_context(Trust(tls_cert=cert, tls_key=cert_key, tls_ca=authority.ca), "test")
        assert tls is not None
        yield Closed(url, neuron_url, neuron.pid, keys, tmp, tls)


def certificates(name: str) -> str:
    own = f'tls_cert = "fleet-{name}.pem"\ntls_key = "fleet-{name}.key"\n'
    return f'{own}tls_ca = "fleet-ca.pem"\n'


async def status_of(closed: Closed, url: str, **headers: str) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=headers, ssl=closed.tls) as reply,
    ):
        return reply.status


async def test_both_sdks_are_served_with_a_key(closed: Closed) -> None:
    key = closed.keys["ample"]
    async with openai.AsyncOpenAI(base_url=f"{closed.url}/v1", api_key=key) as client:
        raw = await client.chat.completions.with_raw_response.create(**ASK)
        completion = raw.parse()
        assert completion.usage is not None
        assert completion.usage.completion_tokens > 0
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) < 100000
    async with anthropic.AsyncAnthropic(base_url=closed.url, api_key=key) as other:
        async with other.messages.stream(**ASK) as stream:
            message = await stream.get_final_message()
        assert message.usage.output_tokens > 0


async def test_without_the_key_or_the_secret_nothing_but_health_answers(closed: Closed) -> None:
    for url, path in (
        (closed.url, "/v1/models"),
        (closed.url, "/nope"),
        (closed.neuron_url, "/models"),
        (closed.neuron_url, "/metrics"),
        (closed.neuron_url, "/nope"),
    ):
        assert await status_of(closed, url + path) == 401
        # A caller's key is nothing to a neuron, and the secret nothing to a gateway.
        wrong = SECRET if url == closed.url else closed.keys["ample"]
        assert await status_of(closed, url + path, authorization=f"Bearer {wrong}") == 401
    assert await status_of(closed, closed.url + "/health") == 200
    assert await status_of(closed, closed.neuron_url + "/health") == 200
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(closed.neuron_url + "/health")


async def test_a_spent_key_hears_so_from_both_sdks(closed: Closed) -> None:
    key = closed.keys["spent"]
    async with openai.AsyncOpenAI(base_url=f"{closed.url}/v1", api_key=key) as client:
        await client.chat.completions.create(**ASK)
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(**ASK)
    async with anthropic.AsyncAnthropic(base_url=closed.url, api_key=key) as other:
        with pytest.raises(anthropic.RateLimitError):
            await other.messages.create(**ASK)


def test_status_shows_the_fleet_to_those_with_a_key(closed: Closed) -> None:
    bare = run_cortex(closed.folder, "status", "-e", closed.url)
    assert "only" not in bare.stdout
    assert "nodes: shown to a key that may use all models" in bare.stdout
    done = run_cortex(closed.folder, "status", "-e", closed.url, "--key", closed.keys["ample"])
    assert done.returncode == 0, done.stderr
    assert "only" in done.stdout
    assert MODEL in done.stdout


def test_usage_shows_limits_and_models_of_the_key(closed: Closed) -> None:
    arguments = ("usage", "-e", closed.url, "--key", closed.keys["ample"])
    done = run_cortex(closed.folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert "key ample of account alice" in done.stdout
    assert "tokens_per_day" in done.stdout
    assert MODEL in done.stdout
    report = msgspec.json.decode(run_cortex(closed.folder, *arguments, "--json").stdout)
    assert report["limits"][0]["limit"] == 100000
    refused = run_cortex(closed.folder, "usage", "-e", closed.url)
    assert refused.returncode == 1
    assert "a key is required" in refused.stderr


def test_the_engine_inherits_no_secret(closed: Closed) -> None:
    engines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == closed.neuron_pid:
                    engines.append((entry / "environ").read_bytes())
            except OSError:
                continue
    assert engines
    assert not any(SECRET.encode() in each for each in engines)
    assert SECRET.encode() in Path(f"/proc/{closed.neuron_pid}/environ").read_bytes()
