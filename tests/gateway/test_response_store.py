"""What is kept of responses: bounds, owners, conversations, files."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from cortex.core.config import ResponsesConfig
from cortex.core.errors import (
    BadRequestError,
    ConfigError,
    ItemNotFoundError,
    PreviousResponseNotFoundError,
    ResponseNotFoundError,
    ResponseStoreError,
)
from cortex.gateway.response_store import ROW_BYTES, Kept, ResponseStore, open_store


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def kept(name: str, previous: str | None = None, owner: str = "a", text: str = "") -> Kept:
    output = [{"type": "message", "id": f"msg_{name}_out", "text": text}]
    return Kept(
        id=name,
        owner=owner,
        previous=previous,
        response=msgspec.json.encode({"id": name, "output": output}),
        items=msgspec.json.encode([{"type": "message", "id": f"msg_{name}_in"}]),
    )


@asynccontextmanager
async def store_of(clock: Clock | None = None, **bounds: object) -> AsyncIterator[ResponseStore]:
    settings = ResponsesConfig(**bounds)  # type: ignore[arg-type]
    async with open_store(lambda: settings, clock or Clock(), lambda *_: None) as store:
        yield store


def ids(items: list[msgspec.Raw]) -> list[str]:
    return [msgspec.json.decode(item)["id"] for item in items]


async def is_kept(store: ResponseStore, name: str, owner: str = "a") -> bool:
    try:
        await store.get(owner, name)
    except ResponseNotFoundError:
        return False
    return True


async def test_what_is_put_can_be_got_until_it_is_deleted() -> None:
    async with store_of() as store:
        assert await store.put(kept("r1"))
        assert await store.get("a", "r1") == kept("r1")
        await store.delete("a", "r1")
        with pytest.raises(ResponseNotFoundError, match="'r1'"):
            await store.get("a", "r1")
        with pytest.raises(ResponseNotFoundError):
            await store.delete("a", "r1")
        with pytest.raises(ItemNotFoundError):
            await store.items("a", ["msg_r1_out"])


async def test_nobody_else_finds_it() -> None:
    async with store_of() as store:
        await store.put(kept("r1"))
        assert not await is_kept(store, "r1", "b")
        with pytest.raises(ResponseNotFoundError):
            await store.delete("b", "r1")
        with pytest.raises(PreviousResponseNotFoundError):
            await store.conversation("b", "r1")
        with pytest.raises(ItemNotFoundError):
            await store.items("b", ["msg_r1_in"])
        assert await is_kept(store, "r1")


async def test_a_conversation_is_all_that_came_before_in_order() -> None:
    async with store_of() as store:
        await store.put(kept("r1"))
        await store.put(kept("r2", "r1"))
        await store.put(kept("r3", "r2"))
        assert ids(await store.conversation("a", "r3")) == [
            "msg_r1_in",
            "msg_r1_out",
            "msg_r2_in",
            "msg_r2_out",
            "msg_r3_in",
            "msg_r3_out",
        ]
        await store.delete("a", "r1")
        with pytest.raises(PreviousResponseNotFoundError, match="'r1'"):
            await store.conversation("a", "r3")


async def test_a_conversation_of_too_many_responses_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cortex.gateway.response_store.MAX_CHAIN", 2)
    async with store_of() as store:
        for name, previous in (("r1", None), ("r2", "r1"), ("r3", "r2")):
            await store.put(kept(name, previous))
        assert len(await store.conversation("a", "r2")) == 4
        with pytest.raises(BadRequestError, match="over 2 responses"):
            await store.conversation("a", "r3")


async def test_items_are_found_by_their_ids_in_inputs_and_outputs() -> None:
    async with store_of() as store:
        await store.put(kept("r1"))
        await store.put(kept("r2"))
        found = await store.items("a", ["msg_r2_out", "msg_r1_in"])
        assert ids([found["msg_r2_out"], found["msg_r1_in"]]) == ["msg_r2_out", "msg_r1_in"]
        with pytest.raises(ItemNotFoundError, match="'msg_no'"):
            await store.items("a", ["msg_r1_in", "msg_no"])


async def test_what_was_used_longest_ago_leaves_when_there_are_too_many() -> None:
    async with store_of(max_count=2) as store:
        for name in ("r1", "r2"):
            await store.put(kept(name))
        await store.conversation("a", "r1")
        await store.put(kept("r3"))
        assert [await is_kept(store, name) for name in ("r1", "r2", "r3")] == [True, False, True]


async def test_going_on_from_a_response_counts_as_a_use_of_all_before_it() -> None:
    async with store_of(max_count=3) as store:
        await store.put(kept("r1"))
        await store.put(kept("other"))
        await store.put(kept("r2", "r1"))
        await store.conversation("a", "r2")
        await store.put(kept("r3", "r2"))
        assert not await is_kept(store, "other")
        assert len(await store.conversation("a", "r3")) == 6


async def test_referring_to_an_item_counts_as_a_use_of_its_response() -> None:
    async with store_of(max_count=2) as store:
        await store.put(kept("r1"))
        await store.put(kept("r2"))
        await store.items("a", ["msg_r1_out"])
        await store.put(kept("r3"))
        assert [await is_kept(store, name) for name in ("r1", "r2", "r3")] == [True, False, True]


async def test_what_was_used_longest_ago_leaves_when_all_is_too_large() -> None:
    large = "x" * ((1 << 19) - 2 * ROW_BYTES)
    async with store_of(max_mb=1) as store:
        for name in ("r1", "r2", "r3"):
            assert await store.put(kept(name, text=large))
        assert [await is_kept(store, name) for name in ("r1", "r2", "r3")] == [False, True, True]


async def test_one_that_alone_is_too_large_is_not_kept() -> None:
    async with store_of(max_mb=1) as store:
        await store.put(kept("r1"))
        assert not await store.put(kept("r2", text="x" * (1 << 20)))
        assert await is_kept(store, "r1")


async def test_what_is_too_old_is_gone() -> None:
    clock = Clock()
    async with store_of(clock, max_age_s=60) as store:
        await store.put(kept("r1"))
        clock.now_s += 61
        assert not await is_kept(store, "r1")
        await store.put(kept("r2"))
        clock.now_s -= 61
        assert not await is_kept(store, "r1")


async def test_a_file_outlives_the_store_and_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    async with store_of(store_file=str(path)) as store:
        await store.put(kept("r1"))
    assert path.stat().st_mode & 0o777 == 0o600
    async with store_of(store_file=str(path)) as store:
        assert await is_kept(store, "r1")


async def test_two_stores_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.sqlite")
    async with store_of(store_file=path) as one, store_of(store_file=path) as other:
        await one.put(kept("r1"))
        await other.put(kept("r2", "r1"))
        assert len(await one.conversation("a", "r2")) == 4


async def test_without_a_file_nothing_outlives_the_store() -> None:
    async with store_of() as store:
        await store.put(kept("r1"))
    async with store_of() as store:
        assert not await is_kept(store, "r1")


async def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_text("not a database, but long enough to look like something that it is not " * 20)
    with pytest.raises(ConfigError, match=r"responses\.store_file") as caught:
        async with store_of(store_file=str(path)):
            raise AssertionError
    assert caught.value.param == "responses.store_file"


async def test_a_store_that_breaks_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    async with store_of(store_file=str(path)) as store:
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE responses")
        database.close()
        with pytest.raises(ResponseStoreError, match="store = false"):
            await store.put(kept("r1"))


async def test_what_is_kept_is_told_at_the_start_and_whenever_it_changes(tmp_path: Path) -> None:
    settings = ResponsesConfig(store_file=str(tmp_path / "responses.sqlite"))
    told: list[tuple[int, int]] = []

    def note(count: int, size_bytes: int) -> None:
        told.append((count, size_bytes))

    one, other = kept("r1"), kept("r2")
    async with open_store(lambda: settings, Clock(), note) as store:
        await store.put(one)
        await store.put(other)
        await store.delete("a", "r1")
    async with open_store(lambda: settings, Clock(), note):
        pass
    assert told == [
        (0, 0),
        (1, one.size),
        (2, one.size + other.size),
        (1, other.size),
        (1, other.size),
    ]
