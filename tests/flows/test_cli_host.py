"""`cortex config check` and `cortex doctor` as an operator uses them."""

import os
import socket
from pathlib import Path

import msgspec

from tests.support.processes import cortex_process, free_port, run_cortex

RPM = Path(__file__).parents[2] / "rpm"


def test_config_check_passes_the_samples(tmp_path: Path):
    files = [str(RPM / name) for name in ("cortex.toml", "neuron.toml")]
    done = run_cortex(tmp_path, "config", "check", *files)
    assert (done.returncode, done.stderr) == (0, "")
    # The catalogue that cortex.toml names comes along.
    gateway, catalogue, neuron = done.stdout.splitlines()
    assert gateway.endswith("cortex.toml: ok, gateway on 0.0.0.0:31313, 2 neurons")
    assert "models.toml: ok, " in catalogue
    assert "neuron.toml: ok, neuron on 0.0.0.0:13131" in neuron


def test_config_check_ends_with_1_and_names_the_key_that_was_meant(tmp_path: Path):
    config = tmp_path / "neuron.toml"
    config.write_text("prot = 1\n")
    done = run_cortex(tmp_path, "config", "check", str(config))
    assert (done.returncode, done.stderr) == (1, "")
    assert "did you mean `port`?" in done.stdout
    done = run_cortex(tmp_path, "config", "check", "--json", str(config))
    assert done.returncode == 1
    report = msgspec.json.decode(done.stdout)
    assert report["ok"] is False
    assert [each["key"] for each in report["files"]] == ["prot"]


def gateway_config(folder: Path, port: int) -> Path:
    path = folder / "cortex.toml"
    path.write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{free_port()}"\n'
    )
    return path


def test_doctor_of_a_gateway_needs_no_torch_and_names_who_holds_its_port(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = gateway_config(tmp_path, port)
        done = run_cortex(tmp_path, "doctor", "--gateway", str(config))
        assert (done.returncode, done.stderr) == (1, "")
        assert f"fail  port: 127.0.0.1:{port} (gateway): held by pid {os.getpid()} (" in done.stdout
        assert "remedy: stop what listens there or choose another port" in done.stdout
    assert "torch" not in done.stdout
    with cortex_process(tmp_path, f"http://127.0.0.1:{port}", "serve", "-c", str(config)) as it:
        done = run_cortex(tmp_path, "doctor", "--gateway", "--json", str(config))
    assert done.returncode == 0, done.stdout
    report = msgspec.json.decode(done.stdout)
    assert report["ok"] is True
    held = [each for each in report["findings"] if f"held by pid {it.pid} (" in each["message"]]
    assert [each["level"] for each in held] == ["ok", "ok"]


def test_doctor_of_a_neuron_looks_at_torch_disks_sockets_and_configuration(tmp_path: Path):
    config = tmp_path / "neuron.toml"
    config.write_text(f'host = "127.0.0.1"\nport = {free_port()}\nstate_dir = "state"\n')
    done = run_cortex(tmp_path, "doctor", "--neuron", "--json", str(config))
    findings = msgspec.json.decode(done.stdout)["findings"]
    levels = {each["check"]: each["level"] for each in findings}
    assert list(levels) == [
        *("build", "config", "port", "driver", "torch", "operators", "state", "cache"),
        *("sockets", "hub"),
    ]
    # A torch that does not fit the card of this machine is a true finding.
    assert levels["torch"] == "ok" or levels["driver"] != "note", findings
    assert (levels["sockets"], levels["hub"]) == ("ok", "note")
    state = next(each for each in findings if each["check"] == "state")
    assert state["message"].startswith(f"{tmp_path}/state: ")
    # Nothing is made by looking.
    assert not (tmp_path / "state").exists()


def test_doctor_ends_with_1_where_a_file_cannot_be_used_and_looks_at_the_rest(tmp_path: Path):
    config = tmp_path / "cortex.toml"
    config.write_text("[gateway]\nlisten = 1\n")
    done = run_cortex(tmp_path, "doctor", "--gateway", str(config))
    assert done.returncode == 1
    assert "fail  config: " in done.stdout
    assert f"remedy: correct it and try `cortex config check {config}`" in done.stdout
    assert "port: 0.0.0.0:31313 (gateway): " in done.stdout
