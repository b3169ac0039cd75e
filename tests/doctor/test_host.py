import http.server
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from cortex.core.config import TorchHarness
from cortex.doctor import host
from cortex.doctor.host import GIB, check_cache, check_hub, check_sockets, check_state_dir


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: SimpleNamespace(free=num_bytes))


@pytest.mark.parametrize(
    ("gib", "state", "cache"),
    [(100, "ok", "ok"), (10, "ok", "warn"), (0.5, "warn", "fail"), (0.01, "fail", "fail")],
)
def test_what_is_free_is_judged_by_what_is_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: float, state: str, cache: str
):
    free(monkeypatch, gib * GIB)
    found = check_state_dir(tmp_path / "not" / "yet")
    assert found.level == state
    assert found.message == f"{tmp_path}/not/yet: {gib:.1f} GiB free"
    (kept,) = check_cache(TorchHarness(hf_cache=str(tmp_path)))
    assert kept.level == cache
    assert (kept.remedy is None) == (cache == "ok")


def test_a_directory_below_a_file_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    assert check_state_dir(tmp_path / "file" / "state").level == "warn"
    (found,) = check_cache(TorchHarness(hf_cache=str(tmp_path / "file" / "hub")))
    assert found.level == "fail"
    assert f"{tmp_path}/file cannot be written" in found.message


def test_without_the_hub_no_cache_is_looked_at():
    assert check_cache(TorchHarness(hub=False)) == []
    assert check_hub(TorchHarness(hub=False)).level == "note"


def test_sockets_can_be_made_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setenv("RUNTIME_DIRECTORY", short)
        found = check_sockets()
        assert (found.level, found.message) == ("ok", f"can be made in {short}")
        assert list(Path(short).iterdir()) == []


def test_a_path_too_long_for_a_socket_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(deep))
    found = check_sockets()
    assert found.level == "fail"
    assert "too long" in found.message
    assert list(deep.iterdir()) == []


@contextmanager
def hub(status: int) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (404, "ok"), (503, "warn")])
def test_a_hub_that_answers_is_fine_unless_it_is_broken(
    monkeypatch: pytest.MonkeyPatch, status: int, level: str
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub(status) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert check_hub(TorchHarness()).level == level
    found = check_hub(TorchHarness())
    assert found.level == "warn"
    assert f"{endpoint} cannot be reached" in found.message


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1")
    assert check_hub(TorchHarness()).level == "note"
