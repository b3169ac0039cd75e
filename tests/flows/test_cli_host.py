"""`cortex config check` as an operator uses it."""

from pathlib import Path

import msgspec

from tests.support.processes import run_cortex

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
