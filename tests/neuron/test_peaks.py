import errno
from pathlib import Path

import pytest

from cortex.neuron import peaks as peaks_module
from cortex.neuron.peaks import PeakKey, Peaks

MIB = 1 << 20


def key(model_id="m", **changes):
    values = {"model_id": model_id, "dtype": "auto", "max_model_len": None, "device": "H200"}
    return PeakKey(**{**values, **changes})


def test_peaks_outlast_the_process(tmp_path):
    first = Peaks(tmp_path / "state" / "peaks.json")
    assert first.note(key(), 500 * MIB)
    first.save()
    second = Peaks(tmp_path / "state" / "peaks.json")
    second.load()
    assert second.base_bytes(key()) == 500 * MIB
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["peaks.json"]


def test_only_what_grows_is_worth_a_note():
    peaks = Peaks(Path("nowhere"))
    assert peaks.note(key(), 500 * MIB)
    assert not peaks.note(key(), 500 * MIB)
    assert not peaks.note(key(), 515 * MIB)
    assert not peaks.note(key(), 100 * MIB)
    assert peaks.note(key(), 516 * MIB)
    assert peaks.base_bytes(key()) == 516 * MIB


def test_a_peak_is_of_a_model_as_it_was_loaded_on_a_kind_of_device():
    peaks = Peaks(Path("nowhere"))
    peaks.note(key(), 500 * MIB)
    for other in (
        key("other"),
        key(dtype="float32"),
        key(max_model_len=10),
        key(device="cpu"),
    ):
        assert peaks.base_bytes(other) == 0


def test_the_models_seen_longest_ago_are_forgotten(monkeypatch):
    monkeypatch.setattr(peaks_module, "MAX_PEAKS", 2)
    peaks = Peaks(Path("nowhere"))
    for name in ("a", "b", "a", "c"):
        peaks.note(key(name), 100 * MIB + peaks.base_bytes(key(name)))
    assert [peaks.base_bytes(key(name)) > 0 for name in ("a", "b", "c")] == [True, False, True]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[1]",
        b'{"version": 1, "peaks": [{"key": {"model_id": 5}}]}',
        b'{"version": 99, "peaks": []}',
        b"\xff\xfe",
        b'{"version": 1, "peaks": [' + b" " * 2_000_000 + b"]}",
    ],
)
def test_a_file_that_cannot_be_read_is_replaced_with_a_warning(tmp_path, caplog, content):
    path = tmp_path / "peaks.json"
    path.write_bytes(content)
    peaks = Peaks(path)
    with caplog.at_level("WARNING"):
        peaks.load()
    assert "cannot be read and begin anew" in caplog.text
    peaks.note(key(), 500 * MIB)
    peaks.save()
    again = Peaks(path)
    again.load()
    assert again.base_bytes(key()) == 500 * MIB


def test_without_a_file_there_is_nothing_to_warn_of(tmp_path, caplog):
    Peaks(tmp_path / "peaks.json").load()
    assert caplog.text == ""


def test_a_full_disk_costs_one_warning_and_leaves_the_old_file(tmp_path, caplog, monkeypatch):
    path = tmp_path / "peaks.json"
    peaks = Peaks(path)
    peaks.note(key(), 500 * MIB)
    peaks.save()
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peaks_module.os, "fsync", full)
    peaks.note(key(), 900 * MIB)
    with caplog.at_level("WARNING"):
        peaks.save()
        peaks.save()
    assert caplog.text.count("cannot be written") == 1
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["peaks.json"]
    assert peaks.base_bytes(key()) == 900 * MIB
