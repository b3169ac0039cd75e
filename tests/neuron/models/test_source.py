import pathlib

from cortex.neuron.models.source import ModelSource, detect, distribution_gguf


def test_a_directory_with_a_config_is_a_checkpoint(tmp_path):
    assert detect(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert detect(tmp_path) == ModelSource(kind="hf", path=str(tmp_path))


def test_a_gguf_file_is_a_checkpoint_and_other_files_are_not(tmp_path):
    for name in ("model.gguf", "notes.txt"):
        (tmp_path / name).write_text("")
    path = tmp_path / "model.gguf"
    assert detect(path) == ModelSource(kind="gguf", path=str(path))
    assert detect(tmp_path / "notes.txt") is None
    assert detect(tmp_path / "absent.gguf") is None


def test_a_distribution_that_is_not_installed_has_no_gguf():
    assert distribution_gguf("no-such-distribution-anywhere") is None


def test_a_distribution_without_a_gguf_has_none():
    assert distribution_gguf("pytest") is None


def test_a_gguf_is_found_through_the_file_list_of_its_distribution(tmp_path, monkeypatch):
    info = tmp_path / "carrier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (info / "RECORD").write_text("carrier/gone.gguf,,\ncarrier/model.gguf,,\n")
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"GGUF")
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = distribution_gguf("carrier")
    assert found == pathlib.Path(tmp_path / "carrier" / "model.gguf")
