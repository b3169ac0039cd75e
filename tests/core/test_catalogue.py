from pathlib import Path

import pytest

from cortex.core.catalogue import CatalogueModel, load_catalogue
from cortex.core.errors import ConfigError
from cortex.core.neuron_api import Device

FULL = """
[[models]]
id = "org/big"
harness = "candle"
vram_mb = 24000
min_devices = 1
min_device_vram_mb = 24000
pinned_on = ["beast"]
residency_priority = 7
source = "hf:org/big"
limit = { context = 1000, input = 900, output = 100 }
cost = { input = 0.5, output = 1.0, cache_read = 0.1, cache_write = 0.2 }
capabilities = ["text"]
[aliases]
big = "org/big"
"""


def load(tmp_path: Path, text: str):
    path = tmp_path / "models.toml"
    path.write_text(text)
    return load_catalogue(path)


def test_every_key_of_the_originals_catalogue_loads(tmp_path: Path):
    catalogue = load(tmp_path, FULL)
    model = catalogue.find("org/big")
    assert model is not None
    assert model.priority == 7
    assert model.limit is not None
    assert model.limit.context == 1000
    assert catalogue.resolve("big") == "org/big"
    assert catalogue.resolve("other") == "other"


def test_a_pinned_model_is_protected_unless_it_says_otherwise():
    assert CatalogueModel(id="a", pinned_on=["x"]).priority == 1000
    assert CatalogueModel(id="a").priority == 100


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[[models]]\nid = 'a'\nquant = 'q6k'", "quant"),
        ("[[models]]\nid = 'a'\nmin_devices = 2", "min_devices"),
        ("[[models]]\nid = 'a'\nharness = 'vllm'", "harness"),
        ("[[models]]\nid = 'a'\n[[models]]\nid = 'a'", "twice"),
        ("[[models]]\nid = 'a'\nvram = 3", "vram"),
        ("[aliases]\na = 'b'\nb = 'c'", "alias"),
        ('[[models]]\nid = "m"\nharness = "command"\ntool_format = "hermes"\n', "tool_format"),
        ('[[models]]\nid = "m"\nharness = "command"\nconstrain_tools = false\n', "constrain"),
        ('[[models]]\nid = "m"\ntool_format = "morse"\n', "morse"),
    ],
)
def test_an_entry_that_cannot_be_honoured_stops_the_start(tmp_path: Path, text: str, word: str):
    with pytest.raises(ConfigError, match=word):
        load(tmp_path, text)


def test_a_missing_catalogue_is_an_error_and_not_an_empty_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_catalogue(tmp_path / "models.toml")


def test_a_model_fits_only_where_one_device_is_large_enough_and_where_it_is_pinned():
    small = Device(index=0, name="3060", vram_total_mb=12288)
    large = Device(index=1, name="5090", vram_total_mb=32607)
    model = CatalogueModel(id="a", min_device_vram_mb=24000)
    assert not model.feasible_on("n", [small])
    assert model.feasible_on("n", [small, large])
    assert not CatalogueModel(id="a", pinned_on=["x"]).feasible_on("n", [large])
    assert CatalogueModel(id="a").feasible_on("n", [])


def test_the_sample_catalogue_loads():
    catalogue = load_catalogue(Path(__file__).parents[2] / "rpm" / "models.toml")
    assert catalogue.resolve("default") == "Qwen/Qwen3.5-27B"


def test_policies_of_a_model_are_read(tmp_path: Path):
    text = """
    [[models]]
    id = "m"
    ttl_s = 600
    min_resident_s = 30
    preload = true
    """
    (model,) = load(tmp_path, text).models
    assert (model.ttl_s, model.min_resident_s, model.preload) == (600, 30, True)


PATTERNS = """
[[models]]
id = "claude-local"
[aliases]
"claude-*" = "m"
"claude-haiku-*" = "small"
exact = "m"
"claude-opus-4" = "big"
"""


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("claude-sonnet-5", "m"),
        ("claude-haiku-4-5", "small"),  # more of it is literal
        ("claude-opus-4", "big"),
        ("claude-local", "claude-local"),  # a model's own id is no pattern's
        ("exact", "m"),
        ("CLAUDE-x", "CLAUDE-x"),
        ("else", "else"),
    ],
)
def test_a_pattern_stands_for_every_name_that_nothing_else_claims(
    tmp_path: Path, name: str, target: str
):
    assert load(tmp_path, PATTERNS).resolve(name) == target


def test_a_name_that_a_node_lists_is_no_patterns(tmp_path: Path):
    catalogue = load(tmp_path, PATTERNS)
    assert catalogue.targets("claude-sonnet-5", is_listed=True) == ("claude-sonnet-5",)
    assert catalogue.names == ["exact", "claude-opus-4"]


def test_a_virtual_model_is_an_ordered_list_and_may_be_behind_an_alias(tmp_path: Path):
    text = """
    [aliases]
    "gpt-*" = "coder"
    [virtual]
    coder = ["big", "small"]
    """
    catalogue = load(tmp_path, text)
    assert catalogue.targets("coder") == ("big", "small")
    assert catalogue.targets("gpt-5") == ("big", "small")
    assert catalogue.resolve("coder") == "big"


def test_the_rivals_of_a_model_are_the_other_members_of_its_groups(tmp_path: Path):
    text = """
    [groups]
    large = ["a", "b"]
    vision = ["c", "a"]
    """
    catalogue = load(tmp_path, text)
    assert catalogue.rivals("a") == {"b", "c"}
    assert catalogue.rivals("z") == set()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[virtual]\nm = ["x"]\n[[models]]\nid = "m"', "name of a model or an alias"),
        ("[virtual]\nv = []", "virtual"),
        ('[virtual]\nv = ["w"]\nw = ["x"]', "may hold models only"),
        ('[groups]\ng = ["a"]', "groups"),
        ('[groups]\ng = ["a", "a"]', "names a model twice"),
    ],
)
def test_a_policy_that_cannot_work_stops_the_start(tmp_path: Path, text: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, text)


def test_two_models_of_a_group_cannot_both_be_kept_on_one_node(tmp_path: Path):
    text = """
    [[models]]
    id = "a"
    preload = true
    pinned_on = ["n"]
    [[models]]
    id = "b"
    preload = true
    pinned_on = ["n"]
    [groups]
    g = ["a", "b"]
    """
    with pytest.raises(ConfigError, match="two models to preload on the same node"):
        load(tmp_path, text)
