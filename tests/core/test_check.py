from pathlib import Path

import pytest

from cortex.core.check import check_file, check_files, default_files, kind_of
from cortex.core.errors import ConfigError

RPM = Path(__file__).parents[2] / "rpm"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o640)
    return path


def test_the_samples_can_be_used():
    # The checker of packages has a file of its own there.
    samples = sorted(each for each in RPM.glob("*.toml") if each.name != "rpmlint.toml")
    verdicts = check_files(samples)
    assert [(Path(each.file).name, each.kind, each.ok, each.warnings) for each in verdicts] == [
        ("cortex.toml", "gateway", True, []),
        ("models.toml", "catalogue", True, []),
        ("neuron-external.toml", "neuron", True, []),
        ("neuron.toml", "neuron", True, []),
    ]


def test_a_wrong_key_is_named_with_its_path_and_the_way_out(tmp_path: Path):
    path = write(tmp_path / "cortex.toml", '[gateway]\nlistn = "127.0.0.1:1"\n')
    verdict = check_file(path)
    assert not verdict.ok
    assert verdict.key == "gateway.listn"
    assert verdict.error == (
        "Object contains unknown field `listn` - at `$.gateway`; did you mean `listen`?"
    )


def test_a_key_of_the_original_is_named_with_the_way_out(tmp_path: Path):
    path = write(tmp_path / "neuron.toml", "[harness.torch.image]\nmax_dim = 1\n")
    verdict = check_file(path)
    assert verdict.key == "harness.torch.image"
    assert verdict.error == ("`harness.torch.image`: image models are not served; remove the table")


def test_an_address_that_is_none_is_found(tmp_path: Path):
    verdict = check_file(write(tmp_path / "cortex.toml", '[gateway]\nmetrics_listen = "9000"\n'))
    assert verdict.key == "gateway.metrics_listen"
    assert verdict.error is not None
    assert "write host:port" in verdict.error


def test_a_file_of_kept_responses_in_a_folder_that_is_not_there_is_found(tmp_path: Path):
    path = tmp_path / "cortex.toml"
    path.write_text('[responses]\nstore_file = "no/kept.sqlite"')
    verdict = check_file(path)
    assert (verdict.ok, verdict.key) == (False, "responses.store_file")
    assert "make the folder" in (verdict.error or "")


def test_what_is_no_toml_tells_the_line(tmp_path: Path):
    verdict = check_file(write(tmp_path / "models.toml", "[[models]\n"))
    assert not verdict.ok
    assert verdict.error is not None
    assert "not valid TOML" in verdict.error
    assert "line 1" in verdict.error


def test_a_missing_file_is_a_verdict_too(tmp_path: Path):
    verdict = check_file(tmp_path / "cortex.toml")
    assert (verdict.ok, verdict.error) == (False, "no such file")


@pytest.mark.parametrize(
    ("name", "tables", "kind"),
    [
        ("neuron.toml", {"gateway": {}}, "neuron"),
        ("beast.toml", {"harness": {}}, "neuron"),
        ("front.toml", {"gateway": {}, "fleet_secret": "x"}, "gateway"),
        ("list.toml", {"aliases": {}}, "catalogue"),
    ],
)
def test_the_name_tells_whose_a_file_is_and_else_its_keys(name: str, tables: dict, kind: str):
    assert kind_of(Path(name), tables) == kind


@pytest.mark.parametrize(
    ("tables", "found"),
    [({"fleet_secret": "x"}, "none"), ({"gateway": {}, "port": 1}, "gateway and neuron")],
)
def test_a_file_that_could_be_anything_says_how_to_name_it(tables: dict, found: str):
    with pytest.raises(ConfigError, match=f"keys of: {found}"):
        kind_of(Path("x.toml"), tables)


def test_the_catalogue_that_a_gateway_names_is_checked_with_it(tmp_path: Path):
    gateway = write(tmp_path / "front.toml", 'models_config = "list.toml"\n[gateway]\n')
    write(tmp_path / "list.toml", '[[models]]\nid = "m"\nvram = 1\n')
    first, second = check_files([gateway])
    assert first.ok
    assert (Path(second.file).name, second.kind, second.key) == (
        "list.toml",
        "catalogue",
        "models[0].vram",
    )
    assert len(check_files([gateway, tmp_path / "list.toml"])) == 2


def test_a_pin_on_a_node_that_does_not_exist_and_an_alias_for_nothing_are_warned_of(
    tmp_path: Path,
):
    gateway = '[[neurons]]\nname = "beast"\nendpoint = "http://beast:13131"\n'
    catalogue = '[[models]]\nid = "m"\npinned_on = ["beats"]\n[aliases]\nx = "n"\n'
    write(tmp_path / "models.toml", catalogue)
    first, second = check_files([write(tmp_path / "cortex.toml", gateway)])
    assert first.warnings == [
        "models.toml: m is pinned on 'beats', and no [[neurons]] has that name"
    ]
    assert second.warnings == [
        "alias 'x' stands for 'n', which is not listed here; it serves only where a neuron lists it"
    ]


def test_a_secret_that_everybody_may_read_is_warned_of(tmp_path: Path):
    path = write(tmp_path / "neuron.toml", 'fleet_secret = "sixteen-or-more-characters"\n')
    assert check_file(path).warnings == []
    path.chmod(0o644)
    (warning,) = check_file(path).warnings
    assert f"chmod 640 {path}" in warning
    assert "sixteen" not in warning


def test_only_files_that_are_there_are_checked_by_default(tmp_path: Path):
    write(tmp_path / "neuron.toml", "")
    write(tmp_path / "other.toml", "")
    assert default_files(tmp_path) == [tmp_path / "neuron.toml"]
