import asyncio
import threading

import httpx2
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from cortex.core.errors import BadRequestError, CheckpointError, LoadFailedError, ModelNotFoundError
from cortex.neuron.hub import (
    Hub,
    HubUnreachableError,
    is_repo_id,
    parse_source,
    retry_pause_s,
)


def checkpoint(path):
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").touch()
    return str(path)


def response(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid/x"))


async def fetch(snapshot, repo_id="org/name", on_bytes=lambda done, total: None):
    return await Hub(cache_dir="/cache", snapshot=snapshot).fetch(repo_id, on_bytes=on_bytes)


async def test_a_repository_is_fetched_into_the_cache_with_the_needed_files_only(tmp_path):
    seen = {}

    def snapshot(repo_id, **options):
        seen.update(options, repo_id=repo_id)
        return checkpoint(tmp_path)

    assert await fetch(snapshot) == tmp_path
    assert (seen["repo_id"], seen["cache_dir"]) == ("org/name", "/cache")
    assert "*.safetensors" in seen["allow_patterns"]
    assert not {"*", "*.bin", "*.pt"} & set(seen["allow_patterns"])
    wanted = filter_repo_objects(
        [
            "model.safetensors",
            "config.json",
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
            "onnx/config.json",
            "1_Pooling/deep/config.json",
            "original/params.json",
            "pytorch_model.bin",
        ],
        allow_patterns=seen["allow_patterns"],
        ignore_patterns=seen["ignore_patterns"],
    )
    assert list(wanted) == ["model.safetensors", "config.json", "1_Pooling/config.json"]


async def test_bytes_are_reported_in_the_event_loop(tmp_path):
    seen = []

    def snapshot(repo_id, *, tqdm_class, **options):
        transfer = tqdm_class(desc="Downloading bytes", total=0, unit="B")
        bar = tqdm_class(desc="Reconstructing", total=0, unit="B")
        files = tqdm_class(desc="Fetching 2 files", total=2)
        bar.total += 10
        transfer.update(99)
        bar.update(4)
        bar.update(6)
        files.update(1)
        return checkpoint(tmp_path)

    def on_bytes(done, total):
        seen.append((done, total, threading.current_thread() is threading.main_thread()))

    await fetch(snapshot, on_bytes=on_bytes)
    assert seen == [(4, 10, True), (10, 10, True)]


async def test_a_cancelled_fetch_ends_the_download_at_its_next_piece():
    started, released, ended = threading.Event(), threading.Event(), threading.Event()

    def snapshot(repo_id, *, tqdm_class, **options):
        bar = tqdm_class(desc="Reconstructing", total=10, unit="B")
        started.set()
        released.wait(10)
        try:
            bar.update(1)
        finally:
            ended.set()
        raise AssertionError("the download went on")

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(fetch(snapshot))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
    released.set()
    assert await asyncio.to_thread(ended.wait, 10)


@pytest.mark.parametrize(
    ("raised", "error", "says"),
    [
        (
            lambda: hub_errors.RepositoryNotFoundError("no", response=response(404)),
            ModelNotFoundError,
            "there is no repository 'org/name' on the hub",
        ),
        (
            lambda: hub_errors.GatedRepoError("no", response=response(403)),
            ModelNotFoundError,
            "accept its terms there and set HF_TOKEN",
        ),
        (
            lambda: hub_errors.HfHubHTTPError("busy", response=response(503)),
            HubUnreachableError,
            "the hub refused 'org/name': busy",
        ),
        (
            lambda: hub_errors.LocalEntryNotFoundError("nothing cached"),
            HubUnreachableError,
            "not complete in the cache",
        ),
        (
            lambda: hub_errors.OfflineModeIsEnabled("offline"),
            HubUnreachableError,
            "HF_HUB_OFFLINE",
        ),
        (lambda: ConnectionError("no route"), HubUnreachableError, "no route"),
        (
            lambda: OSError(28, "No space left on device", "/cache/blob"),
            LoadFailedError,
            "No space left",
        ),
    ],
)
async def test_each_fault_of_the_hub_has_its_own_error(raised, error, says):
    def snapshot(repo_id, **options):
        raise raised()

    with pytest.raises(error) as caught:
        await fetch(snapshot)
    assert says in caught.value.message
    assert "org/name" in caught.value.message


async def test_a_repository_without_safetensors_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(CheckpointError, match="put a GGUF file into a directory of model_dirs"):
        await fetch(lambda repo_id, **options: str(tmp_path))


async def test_without_a_network_and_a_cache_the_real_library_says_unreachable(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError):
        await Hub(cache_dir=str(tmp_path)).fetch("org/name", on_bytes=lambda done, total: None)


async def test_a_complete_cache_serves_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--org--name"
    commit = "0" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    checkpoint(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    found = await Hub(cache_dir=str(tmp_path)).fetch("org/name", on_bytes=lambda done, total: None)
    assert found == snapshot


@pytest.mark.parametrize("text", ["org/name", "Qwen/Qwen3.5-0.8B", "a/b_c.d-e"])
def test_repository_ids_are_known_by_their_form(text):
    assert is_repo_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "a/b/c",
        "../etc",
        "/etc",
        "a/..",
        "a/.hidden",
        ".x/y",
        "a b/c",
        "a/b\n",
        "",
        "a--b/c",
    ],
)
def test_paths_and_other_texts_are_no_repository_ids(text):
    assert not is_repo_id(text)


def test_a_source_may_name_its_scheme_which_is_hf():
    assert parse_source("hf:org/name") == "org/name"
    assert parse_source("org/name") == "org/name"
    with pytest.raises(BadRequestError, match="the only known scheme is hf"):
        parse_source("ollama:org/name")
    with pytest.raises(BadRequestError, match="not a repository id"):
        parse_source("hf:/etc/passwd")


def test_retries_come_at_10_20_40_and_at_most_every_300_seconds():
    assert [retry_pause_s(attempt) for attempt in range(7)] == [10, 20, 40, 80, 160, 300, 300]
    assert retry_pause_s(10_000) == 300
