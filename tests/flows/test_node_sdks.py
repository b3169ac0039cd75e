"""The official npm SDKs against a gateway; skipped where there is no node or npm cannot install."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cortex.core.entitlements import ApiKey, Entitlements
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron
from tests.support.processes import Cortex

SCRIPT = Path(__file__).parents[1] / "support" / "node_sdks.mjs"
PACKAGES = ["openai@6.49.0", "@anthropic-ai/sdk@1.12.0"]
INSTALL_S = 90
RUN_S = 90

Node = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture(scope="module")
def sdks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("the npm SDKs need node and npm")
    folder = tmp_path_factory.mktemp("npm")
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        pytest.skip(f"npm cannot install the SDKs: {exc}")
    shutil.copy(SCRIPT, folder)
    return folder


@pytest.fixture
def node(sdks: Path) -> Node:
    async def run(what: str, url: str, *arguments: str) -> dict[str, Any]:
        async with asyncio.timeout(RUN_S):
            process = await asyncio.create_subprocess_exec(
                *("node", str(sdks / SCRIPT.name), what, url, *arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        found: dict[str, Any] = json.loads(out)
        return found

    return run


async def test_answers_streamed_and_whole_are_the_same_in_both_dialects(node: Node, up: Cortex):
    found = await node("answers", up.url)
    for name in ("chat", "chat_tool", "chat_stop", "message", "message_tool", "message_stop"):
        whole, streamed = found[name]
        assert whole == streamed
    assert found["chat"][0]["content"] == found["message"][0]["text"]
    assert found["chat"][0]["finish"] == "stop"
    assert found["chat_tool"][0]["finish"] == "tool_calls"
    assert [name for name, _ in found["chat_tool"][0]["calls"]] == ["get_weather"]
    assert found["chat_stop"][0]["content"].endswith("4, ")
    assert found["message"][0]["reason"] == "end_turn"
    assert found["message_tool"][0]["reason"] == "tool_use"
    assert found["message_tool"][0]["uses"] == found["chat_tool"][0]["calls"]
    assert found["message_tool"][0]["tokens"][0] == found["counted"]
    assert (found["message_stop"][0]["reason"], found["message_stop"][0]["sequence"]) == (
        "stop_sequence",
        "5",
    )
    for each in found["message_thinking"]:
        assert each["kinds"][0] == "thinking"
    assert found["models"] == [True, True]


LIMITED = Entitlements(keys=[ApiKey(key="k", account_id="a", requests_per_minute=1)])
REQUIRED = Entitlements(require_auth=True, keys=[ApiKey(key="other", account_id="a")])


@pytest.mark.parametrize(
    ("model", "entitlements", "chat", "message"),
    [
        (MockModel("other"), None, ("NotFoundError", 404), ("NotFoundError", 404)),
        (
            MockModel("m", "loaded"),
            REQUIRED,
            ("AuthenticationError", 401),
            ("AuthenticationError", 401),
        ),
        (
            MockModel("m", "loaded", refusal=(400, "x")),
            None,
            ("BadRequestError", 400),
            ("BadRequestError", 400),
        ),
        (
            MockModel("m", "loaded", refusal=(500, "x")),
            None,
            ("InternalServerError", 500),
            ("InternalServerError", 500),
        ),
        (
            MockModel("m", "loaded", refusal=(503, "queue_full")),
            None,
            ("InternalServerError", 503),
            ("OverloadedError", 529),
        ),
    ],
    ids=["404", "401", "400", "500", "503"],
)
async def test_an_error_is_the_exception_that_the_sdks_have_for_it(
    node: Node,
    model: MockModel,
    entitlements: Entitlements | None,
    chat: tuple[str, int],
    message: tuple[str, int],
):
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            found = await node("error", gateway.url, "m")
    assert [(each["kind"], each["status"]) for each in found.values()] == [
        *(chat, chat),
        *(message, message),
    ]


async def test_a_key_over_its_rate_is_a_rate_limit_error(node: Node):
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=LIMITED) as gateway:
            found = await node("error", gateway.url, "m")
    assert found["chat"] is None
    assert [found[name]["kind"] for name in ("chat_stream", "message", "message_stream")] == [
        "RateLimitError",
        "RateLimitError",
        "RateLimitError",
    ]


@pytest.mark.parametrize(
    ("fault", "words"), [("die", "node a broke"), ("error_event", "the engine died")]
)
async def test_a_stream_that_breaks_raises(node: Node, fault: Any, words: str):
    async with MockNeuron(MockModel("m", "loaded", fault=fault)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            found = await node("error", gateway.url, "m")
    for name in ("chat_stream", "message_stream"):
        assert found[name]["kind"] == "APIError"
        assert words in found[name]["message"]
