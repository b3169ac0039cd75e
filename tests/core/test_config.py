from pathlib import Path

import pytest

from cortex.core.config import (
    PrefixCacheConfig,
    load_gateway_config,
    load_neuron_config,
    parse_address,
)
from cortex.core.entitlements import Window
from cortex.core.errors import ConfigError

ORIGINAL_GATEWAY = """
models_config = "models.toml"
[gateway]
listen = "127.0.0.1:4000"
metrics_listen = "127.0.0.1:4001"
[eviction]
strategy = "priority"
defrag_after_cycles = 0
[[neurons]]
name = "beast"
endpoint = "http://beast:13131"
[entitlements]
require_auth = true
[[entitlements.keys]]
key = "sk-1"
account_id = "alice"
key_id = "k1"
hard_cap = 100000
window = { kind = "rolling", seconds = 3600 }
[upstream]
enabled = false
url = "http://accounts"
bearer = "secret"
timeout_secs = 5
served_usage_report_interval_secs = 60
"""

ORIGINAL_NEURON = """
port = 4002
[[harnesses]]
name = "candle"
[[default_models]]
model_id = "cortex-tiny"
harness = "candle"
devices = [0]
[harness.candle]
hf_cache = "hub"
[harness.candle.admission]
max_in_flight = 2
max_queue_depth = 3
max_wait_secs = 7
[harness.candle.prefix_cache]
enabled = false
budget_mb = 512
max_entries = 8
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("host", ["https://a.example", "a.example/x", "*", "A.example", "a b"])
def test_a_host_of_images_that_is_none_stops_the_start(tmp_path: Path, host: str) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text(f'[harness.torch.vision]\nurl_hosts = ["{host}"]')
    with pytest.raises(ConfigError, match="url_hosts"):
        load_neuron_config(path)


def test_hosts_of_images_are_names_patterns_and_ports(tmp_path: Path) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text('[harness.torch.vision]\nurl_hosts = ["a.example", "*.b.example:8443"]')
    vision = load_neuron_config(path).harness.torch.vision
    assert vision.url_hosts == ["a.example", "*.b.example:8443"]


def test_every_key_of_the_originals_gateway_file_loads(tmp_path: Path):
    write(tmp_path / "models.toml", "")
    config = load_gateway_config(write(tmp_path / "cortex.toml", ORIGINAL_GATEWAY))
    assert config.gateway.listen == "127.0.0.1:4000"
    assert config.eviction.strategy == "priority"
    assert config.neurons[0].endpoint == "http://beast:13131"
    assert config.entitlements.keys[0].account_id == "alice"
    assert config.entitlements.keys[0].window == Window(kind="rolling", seconds=3600)
    assert config.models_config == str(tmp_path / "models.toml")


def test_every_key_of_the_originals_neuron_file_loads_under_its_old_table_name(tmp_path: Path):
    config = load_neuron_config(write(tmp_path / "neuron.toml", ORIGINAL_NEURON))
    assert config.port == 4002
    assert config.default_models[0].devices == [0]
    assert config.harness.torch.hf_cache == str(tmp_path / "hub")
    assert config.harness.torch.admission.max_in_flight == 2
    assert config.harness.torch.admission.max_wait_secs == 7
    assert config.harness.torch.prefixes == PrefixCacheConfig(
        enabled=False, budget_mb=512, max_entries=8
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", PrefixCacheConfig(enabled=True, budget_mb=1024, max_entries=32)),
        ("prefix_cache = true", PrefixCacheConfig()),
        ("prefix_cache = false", PrefixCacheConfig(enabled=False)),
        ("prefix_cache = { max_entries = 4 }", PrefixCacheConfig(max_entries=4)),
    ],
)
def test_the_prefix_cache_is_on_off_or_a_table(tmp_path: Path, line: str, expected):
    config = load_neuron_config(write(tmp_path / "neuron.toml", f"[harness.torch]\n{line}"))
    assert config.harness.torch.prefixes == expected


def test_the_environment_can_switch_the_prefix_cache_off(tmp_path: Path, monkeypatch):
    path = write(tmp_path / "neuron.toml", "[harness.torch]\nprefix_cache = true")
    monkeypatch.setenv("NEURON_HARNESS__TORCH__PREFIX_CACHE", "false")
    assert not load_neuron_config(path).harness.torch.prefixes.enabled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gateway]\nlissten = '1:1'", ["cortex.toml", "lissten"]),
        ("[eviction]\nstrategy = 'fifo'", ["cortex.toml", "strategy"]),
        ("[eviction]\ndefrag_after_cycles = -1", ["defrag_after_cycles"]),
        ("[[nodes]]\nname = 'a'", ["cortex.toml", "nodes", "[[neurons]]"]),
        ("[entitlements]\nrequire_auth = true", ["no keys"]),
        ("[upstream]\nenabled = true", ["upstream.enabled"]),
        (
            "[[neurons]]\nname='a'\nendpoint='http://a'\n[[neurons]]\nname='a'\nendpoint='http://b'",
            ["two neurons share a name"],
        ),
        ("[[neurons]]\nname='a'\nendpoint='a:1'", ["neurons", "endpoint"]),
        ("not toml", ["cortex.toml", "not valid TOML"]),
    ],
)
def test_a_bad_gateway_file_names_the_file_and_the_key(tmp_path: Path, text: str, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_gateway_config(write(tmp_path / "cortex.toml", text))
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[default_models]]\nmodel_id = 'a'\nquant = 'q4'", ["default_models.quant", "GGUF"]),
        ("[[default_models]]\nmodel_id = 'a'\ntensor_parallel = 2", ["tensor_parallel"]),
        ("[harness.candle.prefix_cache]\nbudget_mb = 0", ["prefix_cache.budget_mb"]),
        ("[harness.torch]\nprefix_cache = 'on'", ["prefix_cache"]),
        ("[harness.candle.image]\nmax_dim = 64", ["image"]),
        ("[[harnesses]]\nname = 'vllm'", ["harnesses"]),
        ("port = 70000", ["port"]),
        ("[harness.torch]\nmodel_dirs = ['nowhere']", ["nowhere", "not a directory"]),
        ("[harness.torch.models]\nx = 'nothing.gguf'", ["nothing.gguf", "does not exist"]),
    ],
)
def test_a_bad_neuron_file_names_the_key_and_the_way_out(
    tmp_path: Path, text: str, words: list[str]
):
    with pytest.raises(ConfigError) as caught:
        load_neuron_config(write(tmp_path / "neuron.toml", text))
    for word in words:
        assert word in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        load_gateway_config(tmp_path / "cortex.toml")


def test_without_a_models_config_key_the_file_beside_is_used_if_there_is_one(tmp_path: Path):
    path = write(tmp_path / "cortex.toml", "")
    assert load_gateway_config(path).models_config is None
    write(tmp_path / "models.toml", "")
    assert load_gateway_config(path).models_config == str(tmp_path / "models.toml")


def test_the_file_of_kept_responses_is_taken_from_the_files_own_directory(tmp_path: Path):
    path = write(tmp_path / "cortex.toml", '[responses]\nstore_file = "kept.sqlite"\nmax_mb = 1')
    responses = load_gateway_config(path).responses
    assert responses.store_file == str(tmp_path / "kept.sqlite")
    assert (responses.max_count, responses.max_mb, responses.max_age_s) == (4096, 1, 2592000.0)


@pytest.mark.parametrize("name", ["no/kept.sqlite", "."])
def test_a_file_of_kept_responses_that_cannot_be_one_is_refused(tmp_path: Path, name: str):
    path = write(tmp_path / "cortex.toml", f'[responses]\nstore_file = "{name}"')
    with pytest.raises(ConfigError, match=r"responses\.store_file: .* cannot be a file") as caught:
        load_gateway_config(path)
    assert caught.value.param == "responses.store_file"


def test_environment_overrides_single_keys_and_leaves_other_variables_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NEURON_PORT", "4003")
    monkeypatch.setenv("NEURON_HARNESS__TORCH__NUM_THREADS", "2")
    monkeypatch.setenv("NEURON_HARNESS__TORCH__DTYPE", "float32")
    monkeypatch.setenv("NEURON_SOMETHING_ELSE", "x")
    config = load_neuron_config(write(tmp_path / "neuron.toml", "port = 1"))
    assert config.port == 4003
    assert config.harness.torch.num_threads == 2
    assert config.harness.torch.dtype == "float32"


def test_an_environment_override_of_an_unknown_key_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CORTEX_GATEWAY__LISSTEN", "x")
    with pytest.raises(ConfigError, match="lissten"):
        load_gateway_config(None)


def test_addresses_are_split_into_host_and_port():
    assert parse_address("0.0.0.0:31313", "listen") == ("0.0.0.0", 31313)
    assert parse_address("[::1]:80", "listen") == ("::1", 80)


@pytest.mark.parametrize("text", ["31313", "host:", "host:http", "host:70000", ""])
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(ConfigError, match="not an address"):
        parse_address(text, "gateway.listen")


def test_the_sample_configurations_load():
    rpm = Path(__file__).parents[2] / "rpm"
    assert [each.name for each in load_gateway_config(rpm / "cortex.toml").neurons] == [
        "beast",
        "benjy",
    ]
    assert load_neuron_config(rpm / "neuron.toml").default_models[0].model_id == "cortex-tiny"
