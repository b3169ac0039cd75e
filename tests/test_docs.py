"""The documents match the code."""

import re
from pathlib import Path

import msgspec
import pytest

from cortex.core import catalogue, command, config, entitlements
from cortex.core.neuron_api import DeviceHealth, ModelLoad, NeuronHealth
from cortex.gateway.fleet import Fleet
from cortex.gateway.metrics import Metrics
from tests.support import transcripts

ROOT = Path(__file__).parents[1]
STRUCTS = [
    config.GatewayConfig,
    config.GatewayListen,
    config.Eviction,
    config.ResponsesConfig,
    config.NeuronAddress,
    entitlements.Entitlements,
    entitlements.ApiKey,
    entitlements.LimitsConfig,
    entitlements.Window,
    config.Upstream,
    config.NeuronConfig,
    config.HarnessName,
    config.DefaultModel,
    config.TorchHarness,
    config.PrefixCacheConfig,
    config.Admission,
    config.Vision,
    config.CommandHarness,
    command.CommandModel,
    catalogue.CatalogueModel,
]
TABLES = {
    "limits",
    "gateway",
    "responses",
    "eviction",
    "neurons",
    "entitlements",
    "keys",
    "upstream",
} | {
    "harnesses",
    "default_models",
    "harness",
    "admission",
    "vision",
}


def documented_keys() -> set[str]:
    text = (ROOT / "docs" / "configuration.md").read_text()
    cells = re.findall(r"^\| ([^|]+) \|", text, flags=re.MULTILINE)
    return {
        key for cell in cells if "**" not in cell for key in re.findall(r"`([a-z_0-9]+)`", cell)
    }


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_configuration_key_is_documented(struct: type[msgspec.Struct]):
    keys = {field.name for field in msgspec.structs.fields(struct)}
    assert keys - TABLES - documented_keys() == set()


def test_no_documented_key_is_unknown_to_the_code():
    known = {field.name for struct in STRUCTS for field in msgspec.structs.fields(struct)}
    assert documented_keys() - known == set()


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_documents_lead_somewhere(page: str):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_documented_metrics_are_those_of_the_gateway():
    text = (ROOT / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"`(cortex_(?!neuron)[a-z_]+)`", text))
    fleet = Fleet([("a", "http://a")])
    fleet.record_reading("a", [], _busy_health(), stamp=0)
    families = list(Metrics(fleet).registry.collect())
    names = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in families
    }
    assert documented == names


def _busy_health() -> NeuronHealth:
    device = DeviceHealth(index=0, vram_used_mb=1, vram_free_mb=1)
    load = ModelLoad(id="m", rejected_queue_full=1)
    return NeuronHealth(uptime_secs=1, devices=[device], models=[load])


CLIENTS = (ROOT / "docs" / "clients.md").read_text()


def test_the_clients_that_were_tried_are_those_of_the_transcripts():
    rows = re.findall(r"^\| ([\w -]+) \| ([\d.]+) \|", CLIENTS, flags=re.MULTILINE)
    recorded = [transcripts.load(name) for name in transcripts.names()]
    assert dict(rows) == {each.client: each.version for each in recorded}


def test_each_client_that_was_tried_is_installed_by_its_package():
    installed = set(
        re.findall(r"^    (?:npm install -g|pip install) (\S+)$", CLIENTS, re.MULTILINE)
    )
    assert installed == {transcripts.load(name).package for name in transcripts.names()}


def test_the_settings_of_clients_can_be_read():
    settings = re.findall(r"^```(json|toml|yaml)\n(.+?)^```", CLIENTS, re.MULTILINE | re.DOTALL)
    read = {"json": msgspec.json.decode, "toml": msgspec.toml.decode, "yaml": msgspec.yaml.decode}
    assert [kind for kind, _ in settings] == ["toml", "toml", "json", "json", "yaml"]
    for kind, text in settings:
        assert "cortex-tiny" in str(read[kind](text))
