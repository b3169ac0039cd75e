import re
import threading
from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest

from cortex.core.errors import CheckpointError
from cortex.neuron import library as library_module
from cortex.neuron.library import BUNDLED_DIR, Library
from cortex.neuron.models.facts import describe
from cortex.neuron.models.source import ModelSource
from tests.support.neuron_fakes import add_model, read_facts


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def make(*model_dirs, **options):
    values = {"bundled": None, "demos": (), "read_facts": read_facts, "clock": Clock()}
    return Library(model_dirs=list(model_dirs), **(values | options))


def ids(library):
    library.scan()
    return list(library.entries)


def test_children_with_a_config_and_gguf_files_are_served(tmp_path):
    add_model(tmp_path, "alpha")
    (tmp_path / "Beta-1B.Q4_K_M.gguf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert ids(make(tmp_path)) == ["Beta-1B.Q4_K_M", "alpha"]


def test_the_bundled_model_is_always_there():
    library = make(bundled=BUNDLED_DIR)
    assert ids(library) == ["cortex-tiny"]
    assert library.find("cortex-tiny").source.kind == "hf"


def test_a_demo_distribution_is_served_without_its_quant_suffix(tmp_path, monkeypatch):
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    monkeypatch.setattr(library_module, "distribution_gguf", {"carrier": file}.get)
    library = make(demos=("carrier", "not-installed"))
    assert ids(library) == ["SmolLM2-135M-Instruct"]
    assert library.find("SmolLM2-135M-Instruct").source.path == str(file)


@pytest.mark.parametrize(
    ("stem", "model_id"),
    [
        ("A-1B.Q4_1", "A-1B"),
        ("A-1B-Q8_0", "A-1B"),
        ("A-1B.q4_k_m", "A-1B"),
        ("A-1B-IQ4_XS", "A-1B"),
        ("A-1B-f16", "A-1B"),
        ("A-1B.BF16", "A-1B"),
        ("Qwen3-0.6B", "Qwen3-0.6B"),
        ("plain", "plain"),
    ],
)
def test_a_quant_suffix_is_cut_and_nothing_else(tmp_path, monkeypatch, stem, model_id):
    monkeypatch.setattr(library_module, "distribution_gguf", lambda name: tmp_path / f"{stem}.gguf")
    assert ids(make(demos=("carrier",))) == [model_id]


def test_named_checkpoints_win_over_all_others_wherever_they_lie(tmp_path):
    named = add_model(tmp_path / "elsewhere", "Mine")
    file = tmp_path / "Some.Q8_0.gguf"
    file.touch()
    add_model(tmp_path / "models", "alpha")
    library = make(
        tmp_path / "models", bundled=BUNDLED_DIR, models={"alpha": named, "cortex-tiny": file}
    )
    assert ids(library) == ["alpha", "cortex-tiny"]
    assert library.find("alpha").source == ModelSource(kind="hf", path=str(named))
    assert library.find("cortex-tiny").source == ModelSource(kind="gguf", path=str(file))


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("config.json", '{"model_type": "gpt_oss"}', "model_type 'gpt_oss' is not supported"),
        ("config.json", "{", "config.json: Input data was truncated"),
        ("notes.txt", "", "cannot read .*config.json: No such file"),
    ],
)
def test_a_named_directory_that_is_no_checkpoint_is_listed_with_its_error(
    tmp_path, name, content, cause
):
    (tmp_path / name).write_text(content)
    library = make(models={"broken": tmp_path}, read_facts=describe)
    assert ids(library) == ["broken"]
    library.describe_all()
    assert re.search(cause, library.find("broken").error.message)


def test_a_named_file_that_is_no_checkpoint_is_listed_with_its_error(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"PK\x03\x04")
    library = make(models={"broken": path}, read_facts=describe)
    library.scan()
    library.describe_all()
    assert "does not begin with GGUF" in library.find("broken").error.message


def test_a_checkpoint_that_could_not_be_read_is_tried_again(tmp_path):
    add_model(tmp_path, "m")
    outcomes = [CheckpointError("no model.safetensors")]

    def read(source):
        if outcomes:
            raise outcomes.pop()
        return read_facts(source)

    library = make(tmp_path, read_facts=read)
    library.scan()
    assert library.describe(library.find("m")).error.message == "no model.safetensors"
    assert library.describe(library.find("m")).facts.num_parameters == 1000
    assert library.find("m").error is None


def test_links_out_of_a_directory_hidden_names_and_the_directory_itself_are_not_served(tmp_path):
    inside, outside = tmp_path / "models", add_model(tmp_path, "outside")
    add_model(inside, "real")
    add_model(inside, ".hidden")
    (inside / "way-out").symlink_to(outside)
    (inside / "dangling").symlink_to(tmp_path / "nothing")
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "nick").symlink_to(inside / "real")
    (tmp_path / "secret.gguf").touch()
    (inside / "secret.gguf").symlink_to(tmp_path / "secret.gguf")
    (inside / "config.json").write_text("{}")
    assert ids(make(inside)) == ["nick", "real"]


def test_the_first_of_two_checkpoints_with_one_name_is_served(tmp_path):
    first = add_model(tmp_path / "a", "m")
    add_model(tmp_path / "b", "m")
    (tmp_path / "b" / "m.gguf").touch()
    library = make(tmp_path / "a", tmp_path / "b")
    assert ids(library) == ["m", "m.gguf"]
    assert library.find("m").source.path == str(first)


def test_a_model_that_comes_or_goes_is_seen_by_the_next_scan(tmp_path):
    add_model(tmp_path, "old")
    library = make(tmp_path)
    assert ids(library) == ["old"]
    (tmp_path / "old" / "config.json").unlink()
    add_model(tmp_path, "new")
    assert ids(library) == ["new"]


def test_a_listing_is_fresh_for_half_a_second(tmp_path):
    clock = Clock()
    library = make(tmp_path, clock=clock)
    assert not library.is_fresh
    library.scan()
    assert library.is_fresh
    clock.now_s = 0.5
    assert not library.is_fresh


def test_facts_are_read_once_and_again_when_the_checkpoint_changes(tmp_path):
    path = add_model(tmp_path, "m", parameters=5)
    read = []

    def counting(source):
        read.append(source)
        return read_facts(source)

    library = make(tmp_path, read_facts=counting)
    for _ in range(3):
        library.scan()
        library.describe_all()
    assert len(read) == 1
    assert library.find("m").facts.num_parameters == 5
    (path / "parameters").write_text("7")
    (path / "config.json").write_text('{"model_type": "llama", "changed": true}')
    library.scan()
    library.describe_all()
    assert library.find("m").facts.num_parameters == 7


def test_threads_that_want_the_same_facts_read_them_once(tmp_path):
    add_model(tmp_path, "m")
    read, reading, go_on = [], threading.Event(), threading.Event()

    def slow(source):
        read.append(source)
        reading.set()
        go_on.wait(10)
        return read_facts(source)

    library = make(tmp_path, read_facts=slow)
    library.scan()
    entry = library.find("m")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(library.describe, entry)
        reading.wait(10)
        second = threads.submit(library.describe, entry)
        go_on.set()
        assert first.result().facts == second.result().facts
    assert len(read) == 1


def test_a_checkpoint_that_cannot_be_read_is_listed_with_its_error(tmp_path):
    add_model(tmp_path, "m")

    def fail(source):
        raise CheckpointError("config.json: not JSON")

    library = make(tmp_path, read_facts=fail)
    library.scan()
    library.describe_all()
    assert library.find("m").error.message == "config.json: not JSON"


def test_a_directory_that_has_gone_serves_nothing(tmp_path):
    assert ids(make(tmp_path / "gone")) == []


def test_a_directory_with_too_many_entries_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(library_module, "MAX_ENTRIES_PER_DIR", 2)
    for name in ("a", "b", "c"):
        add_model(tmp_path, name)
    assert ids(make(tmp_path)) == ["a", "b"]


def test_a_real_gguf_file_is_described(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    library = Library(model_dirs=[tmp_path], bundled=None, demos=(), clock=Clock())
    library.scan()
    library.describe_all()
    assert "'mamba' is not supported" in library.find("m").error.message
