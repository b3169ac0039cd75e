"""The keys with which gateways and neurons know each other."""

from pathlib import Path

import pytest

from cortex.core.config import child_environment, load_gateway_config, load_neuron_config
from cortex.core.errors import ConfigError
from tests.support.certificates import Authority

SECRET = "correct-horse-battery"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_secret_comes_from_the_file_beside_the_configuration(tmp_path: Path):
    write(tmp_path / "secret", SECRET + "\n")
    text = "fleet_secret_file = 'secret'"
    gateway = load_gateway_config(write(tmp_path / "cortex.toml", text))
    neuron = load_neuron_config(write(tmp_path / "neuron.toml", text))
    assert gateway.fleet_secret == SECRET
    assert neuron.fleet_secret == SECRET


def test_the_secret_comes_from_the_environment_even_if_it_is_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CORTEX_FLEET_SECRET", "1234567890123456")
    monkeypatch.setenv("NEURON_FLEET_SECRET", SECRET)
    assert load_gateway_config(None).fleet_secret == "1234567890123456"
    assert load_neuron_config(None).fleet_secret == SECRET


def test_engines_do_not_inherit_the_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEURON_FLEET_SECRET", SECRET)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    environment = child_environment({"A": "b"})
    assert "NEURON_FLEET_SECRET" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["A"] == "b"


def test_paths_of_certificates_are_taken_from_the_directory_of_the_file(tmp_path: Path):
    authority = Authority(tmp_path, "fleet")
    cert, key = authority.issue("beast")
    text = "tls_cert = 'fleet-beast.pem'\ntls_key = 'fleet-beast.key'\ntls_ca = 'fleet-ca.pem'\n"
    neuron = load_neuron_config(write(tmp_path / "neuron.toml", text))
    assert (neuron.tls_cert, neuron.tls_key, neuron.tls_ca) == (cert, key, authority.ca)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fleet_secret = 'short'", "fleet_secret"),
        ("fleet_secret = 'has a space in its middle'", "fleet_secret"),
        (f"fleet_secret = '{SECRET}'\nfleet_secret_file = 'secret'", "not both"),
        ("fleet_secret_file = 'nowhere'", "No such file"),
        ("fleet_secret_file = 'short'", "16 to 256"),
        ("tls_cert = 'a.pem'", "go together"),
        ("tls_cert = 'a.pem'\ntls_key = 'a.key'", "tls_cert, tls_key, tls_ca"),
        ("tls_cert = 'short'\ntls_key = 'short'", "tls_cert, tls_key, tls_ca"),
        ("tls_ca = 'ca.pem'", "set tls_cert and tls_key"),
    ],
)
def test_a_trust_that_cannot_work_stops_the_start_of_a_neuron(
    tmp_path: Path, text: str, words: str
):
    write(tmp_path / "short", "tiny-secret")
    with pytest.raises(ConfigError) as caught:
        load_neuron_config(write(tmp_path / "neuron.toml", text))
    assert words in caught.value.message
    assert "tiny-secret" not in caught.value.message


def test_certificates_without_an_https_endpoint_stop_the_start_of_a_gateway(tmp_path: Path):
    text = "tls_ca = 'ca.pem'\n[[neurons]]\nname = 'a'\nendpoint = 'http://a'"
    with pytest.raises(ConfigError, match="https://"):
        load_gateway_config(write(tmp_path / "cortex.toml", text))
