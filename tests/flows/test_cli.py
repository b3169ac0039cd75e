"""The `cortex` command as people use it on a terminal."""

import hashlib
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest

from cortex.core.config import load_gateway_config
from tests.support.processes import Cortex, answers, environment, free_port, run_cortex


def test_version_names_the_package_and_torch(tmp_path: Path):
    done = run_cortex(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("cortex 0.2.0 (")
    first, second = done.stdout.splitlines()
    assert "torch 2." in first
    assert re.fullmatch(
        r"built \S+, Python 3\.\d+\.\d+, (native-gdn.*|no native operators)", second
    )


@pytest.mark.parametrize(
    "command",
    ["serve", "neuron", "up", "status", "plan", "why", "usage", "keys", "config", "doctor"],
)
def test_help_explains_each_command(tmp_path: Path, command: str):
    done = run_cortex(tmp_path, command, "--help")
    assert done.returncode == 0
    assert "--help" in done.stdout


def test_status_shows_nodes_and_models_and_ends_with_0_when_all_is_well(up: Cortex, tmp_path: Path):
    done = run_cortex(tmp_path, "status", "-e", up.url)
    assert done.returncode == 0, done.stderr
    assert "cortex-tiny" in done.stdout
    assert "loaded" in done.stdout


def test_status_as_json_is_one_object(up: Cortex, tmp_path: Path):
    done = run_cortex(tmp_path, "status", "-e", up.url, "--json")
    assert done.returncode == 0
    report = msgspec.json.decode(done.stdout)
    assert report["status"] == "ok"
    assert "cortex-tiny" in [model["id"] for model in report["models"]]


def test_plan_shows_where_a_request_would_go(up: Cortex, tmp_path: Path):
    done = run_cortex(tmp_path, "plan", "cortex-tiny", "-e", up.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cortex-tiny: would be served by ")
    done = run_cortex(tmp_path, "plan", "cortex-tiny", "-e", up.url, "--json")
    assert msgspec.json.decode(done.stdout)["action"] == "serve"
    done = run_cortex(tmp_path, "plan", "nope", "-e", up.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "model 'nope' does not exist" in done.stderr


def test_why_shows_the_decision_about_a_request(up: Cortex, tmp_path: Path):
    body = {"model": "cortex-tiny", "messages": [{"role": "user", "content": "Hi"}]}
    request = urllib.request.Request(
        f"{up.url}/v1/chat/completions",
        data=msgspec.json.encode({**body, "max_tokens": 2}),
        headers={"content-type": "application/json", "x-request-id": "cli-why"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["x-request-id"] == "cli-why"
    done = run_cortex(tmp_path, "why", "cli-why", "-e", up.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cli-why: cortex-tiny, ok")
    assert "sent to " in done.stdout
    done = run_cortex(tmp_path, "why", "cli-why", "-e", up.url, "--json")
    assert msgspec.json.decode(done.stdout)["steps"][0]["action"] == "serve"
    done = run_cortex(tmp_path, "why", "nobody", "-e", up.url)
    assert done.returncode == 1
    assert "request 'nobody' is not among the last 512" in done.stderr


def test_plan_at_a_gateway_that_is_not_there_says_so_in_a_line(tmp_path: Path):
    url = f"http://127.0.0.1:{free_port()}"
    assert f"{url} cannot be reached" in one_line_error(tmp_path, "plan", "m", "-e", url)


def test_status_of_a_gateway_that_is_not_there_ends_with_2(tmp_path: Path):
    done = run_cortex(tmp_path, "status", "-e", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_status_of_a_gateway_without_a_healthy_node_ends_with_1(tmp_path: Path):
    port, metrics, nobody = free_port(), free_port(), free_port()
    config = tmp_path / "cortex.toml"
    config.write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics}"\n'
        f'[[neurons]]\nname = "gone"\nendpoint = "http://127.0.0.1:{nobody}"\n'
    )
    with subprocess.Popen(
        [sys.executable, "-m", "cortex", "serve", "-c", str(config)], env=environment(tmp_path)
    ) as gateway:
        try:
            for _ in range(100):
                done = run_cortex(tmp_path, "status", "-e", f"http://127.0.0.1:{port}")
                if done.returncode != 2:
                    break
        finally:
            gateway.terminate()
            assert gateway.wait(30) == 0
    assert done.returncode == 1
    assert "gone" in done.stdout


def one_line_error(tmp_path: Path, *arguments: str) -> str:
    done = run_cortex(tmp_path, *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_a_port_in_use_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = one_line_error(tmp_path, "up", "--port", port)
    assert port in line
    assert "in use" in line


def test_a_missing_configuration_is_named(tmp_path: Path):
    line = one_line_error(tmp_path, "serve", "-c", str(tmp_path / "cortex.toml"))
    assert "cortex.toml" in line
    assert "no such file" in line


def test_a_bad_configuration_names_the_key(tmp_path: Path):
    config = tmp_path / "neuron.toml"
    config.write_text("prot = 1")
    assert "prot" in one_line_error(tmp_path, "neuron", "-c", str(config))


def test_a_missing_catalogue_is_named(tmp_path: Path):
    config = tmp_path / "cortex.toml"
    config.write_text('models_config = "gone.toml"')
    assert "gone.toml" in one_line_error(tmp_path, "serve", "-c", str(config))


def test_up_with_a_path_that_is_not_there_says_so(tmp_path: Path):
    assert "no such file" in one_line_error(tmp_path, "up", "./no-such-model")


def test_up_with_an_unreadable_checkpoint_says_why(tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt_oss"}')
    ports = [str(free_port()) for _ in range(3)]
    line = one_line_error(
        tmp_path,
        *("up", str(broken), "--log-level", "error"),
        *("--port", ports[0], "--metrics-port", ports[1], "--neuron-port", ports[2]),
    )
    assert "gpt_oss" in line


@pytest.mark.parametrize("moment", ["before", "while"])
def test_sigterm_during_the_first_load_ends_everything(tmp_path: Path, moment: str):
    ports = [str(free_port()) for _ in range(3)]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cortex", "up", "--log-level", "error"),
            *("--port", ports[0], "--metrics-port", ports[1], "--neuron-port", ports[2]),
        ],
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    running = Cortex(process, int(ports[0]), int(ports[1]), int(ports[2]))
    engines: list[int] = []
    try:
        while not answers(running.url if moment == "before" else running.neuron_url):
            assert process.poll() is None
        while moment == "while" and not engines:
            engines = running.engine_pids()
        process.terminate()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert errors == ""
    assert not any(Path(f"/proc/{pid}").exists() for pid in engines)


def test_keys_new_prints_a_key_and_the_entry_that_lets_it_in(tmp_path: Path):
    done = run_cortex(tmp_path, "keys", "new", 'ali"ce', "--id", "laptop")
    assert done.returncode == 0
    key = next(line for line in done.stderr.splitlines() if line.startswith("sk-cortex-"))
    assert key not in done.stdout
    (tmp_path / "cortex.toml").write_text(done.stdout)
    entry = load_gateway_config(tmp_path / "cortex.toml").entitlements.keys[0]
    assert (entry.account_id, entry.key_id) == ('ali"ce', "laptop")
    assert entry.sha256 == hashlib.sha256(key.encode()).hexdigest()


def test_keys_hash_reads_a_key_from_stdin_and_warns_of_a_short_one(tmp_path: Path):
    done = run_cortex(tmp_path, "keys", "hash", "alice", stdin="secret\n")
    assert done.returncode == 0
    assert "key has 6 characters" in done.stderr
    assert done.stdout == (
        "[[entitlements.keys]]\n"
        'key_sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"\n'
        'account_id = "alice"\n'
    )
