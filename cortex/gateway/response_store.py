"""Responses that are kept to be gone on from and to be fetched again.

They are in an SQLite database, in memory or, where the configuration names one, in a file, which
then outlives the gateway and may be shared by several of one host. Count, size and age are bounded;
what was used longest ago leaves first. One named thread does all of the work.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from cortex.core.config import ResponsesConfig
from cortex.core.errors import (
    BadRequestError,
    ConfigError,
    ItemNotFoundError,
    PreviousResponseNotFoundError,
    ResponseNotFoundError,
    ResponseStoreError,
)

# Turns of one conversation.
MAX_CHAIN = 4096
# How long a request waits for the store, and the store for another gateway that writes.
STORE_S = 10.0
BUSY_S = 5.0
# What a row takes beside its texts, indices included.
ROW_BYTES = 512

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    previous TEXT,
    created_s REAL NOT NULL,
    used INTEGER NOT NULL,
    size INTEGER NOT NULL,
    response BLOB NOT NULL,
    input BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used, size);
CREATE INDEX IF NOT EXISTS responses_created ON responses (created_s);
CREATE TABLE IF NOT EXISTS items (
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
    PRIMARY KEY (owner, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_response ON items (response_id);
"""

T = TypeVar("T")


class _Output(msgspec.Struct, kw_only=True, frozen=True):
    """The one part of a kept response that is read."""

    output: list[msgspec.Raw]


class _Identified(msgspec.Struct, kw_only=True, frozen=True):
    """The one part of an item that is read."""

    id: str | None = None


_output_decoder = msgspec.json.Decoder(_Output)
_items_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_identified_decoder = msgspec.json.Decoder(_Identified)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A response that is kept.

    Attributes:
        owner: whose it is.
        response: as the caller was told it, JSON.
        items: its own input, a JSON list; each item has an id.
    """

    id: str
    owner: str
    previous: str | None
    response: bytes
    items: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return len(self.response) + len(self.items) + ROW_BYTES


class ResponseStore:
    """The responses that this gateway keeps; made by `open_store`.

    Args:
        settings: the bounds of this moment.
        wall_clock: seconds since 1970.
        on_change: told, on the store's own thread, how many responses there are, and their bytes.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        thread: ThreadPoolExecutor,
        settings: Callable[[], ResponsesConfig],
        wall_clock: Callable[[], float],
        on_change: Callable[[int, int], None],
    ) -> None:
        self._database = database
        self._thread = thread
        self._settings = settings
        self._wall_clock = wall_clock
        self._on_change = on_change

    async def look(self) -> None:
        """Tell what is kept."""
        await self._run(lambda: self._on_change(*self._standing()))

    async def put(self, kept: Kept) -> bool:
        """Keep a response; False if it alone is over the bounds.

        Raises:
            ResponseStoreError: the store does not work.
        """
        return await self._run(lambda: self._put(kept))

    async def get(self, owner: str, response_id: str) -> Kept:
        """Return a response.

        Raises:
            ResponseNotFoundError: it is not kept, or is somebody else's.
            ResponseStoreError: the store does not work.
        """
        return await self._run(lambda: self._get(owner, response_id))

    async def delete(self, owner: str, response_id: str) -> None:
        """Forget a response; raises as `get`."""
        await self._run(lambda: self._delete(owner, response_id))

    async def conversation(self, owner: str, response_id: str) -> list[msgspec.Raw]:
        """Return the items of a response and of all that it goes on from, inputs and outputs.

        Raises:
            PreviousResponseNotFoundError: one of them is not kept any more, or is not the owner's.
            BadRequestError: they are over MAX_CHAIN.
            ResponseStoreError: the store does not work.
        """
        return await self._run(lambda: self._conversation(owner, response_id))

    async def items(self, owner: str, item_ids: list[str]) -> dict[str, msgspec.Raw]:
        """Return items by their ids.

        Raises:
            ItemNotFoundError: one of them is not kept, or is somebody else's.
            ResponseStoreError: the store does not work.
        """
        return await self._run(lambda: self._items(owner, item_ids))

    async def _run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(STORE_S):
                return await loop.run_in_executor(self._thread, work)
        except TimeoutError as exc:
            raise ResponseStoreError(
                f"the store of responses did not answer within {STORE_S:g} s; try again, or send "
                "the whole conversation with store = false"
            ) from exc
        except sqlite3.Error as exc:
            raise ResponseStoreError(
                f"the store of responses does not work: {exc}; send the whole conversation with "
                "store = false until whoever runs this URL has mended it"
            ) from exc

    def _put(self, kept: Kept) -> bool:
        bounds = self._settings()
        if kept.size > bounds.max_mb << 20:
            return False
        now_s = self._wall_clock()
        with self._writing() as database:
            database.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    kept.id,
                    kept.owner,
                    kept.previous,
                    now_s,
                    self._next_use(),
                    kept.size,
                    kept.response,
                    kept.items,
                ),
            )
            database.executemany(
                "INSERT OR REPLACE INTO items VALUES (?, ?, ?)",
                [(kept.owner, item_id, kept.id) for item_id in _by_id(_all_items(kept))],
            )
            self._make_room(bounds, now_s)
        self._on_change(*self._standing())
        return True

    def _standing(self) -> tuple[int, int]:
        found = self._database.execute("SELECT COUNT(*), SUM(size) FROM responses").fetchone()
        return found[0], found[1] or 0

    def _make_room(self, bounds: ResponsesConfig, now_s: float) -> None:
        database = self._database
        database.execute("DELETE FROM responses WHERE created_s < ?", (now_s - bounds.max_age_s,))
        count, size = self._standing()
        oldest = database.execute("SELECT id, size FROM responses ORDER BY used")
        leaving: list[tuple[str]] = []
        while count > bounds.max_count or size > bounds.max_mb << 20:
            response_id, freed = oldest.fetchone()
            leaving.append((response_id,))
            count, size = count - 1, size - freed
        oldest.close()
        database.executemany("DELETE FROM responses WHERE id = ?", leaving)

    def _get(self, owner: str, response_id: str) -> Kept:
        kept = self._find(owner, response_id)
        if kept is None:
            raise ResponseNotFoundError(f"response '{response_id[:64]}' is not kept here")
        return kept

    def _find(self, owner: str, response_id: str) -> Kept | None:
        row = self._database.execute(
            "SELECT id, owner, previous, response, input FROM responses "
            "WHERE id = ? AND owner = ? AND created_s >= ?",
            (response_id, owner, self._wall_clock() - self._settings().max_age_s),
        ).fetchone()
        if row is None:
            return None
        found_id, found_owner, previous, response, items = row
        return Kept(
            id=found_id, owner=found_owner, previous=previous, response=response, items=items
        )

    def _delete(self, owner: str, response_id: str) -> None:
        self._get(owner, response_id)
        with self._writing() as database:
            database.execute("DELETE FROM responses WHERE id = ?", (response_id,))
        self._on_change(*self._standing())

    def _conversation(self, owner: str, response_id: str) -> list[msgspec.Raw]:
        chain: list[Kept] = []
        wanted: str | None = response_id
        while wanted is not None:
            if len(chain) == MAX_CHAIN:
                raise BadRequestError(
                    f"the conversation has over {MAX_CHAIN} responses; send what of it matters as "
                    "input",
                    param="previous_response_id",
                )
            kept = self._find(owner, wanted)
            if kept is None:
                raise PreviousResponseNotFoundError(
                    f"response '{wanted[:64]}' is not kept here, so nothing goes on from it; send "
                    "the conversation as input",
                    param="previous_response_id",
                )
            chain.append(kept)
            wanted = kept.previous
        chain.reverse()
        # Whoever goes on from a response needs all that is before it.
        self._touch([kept.id for kept in chain])
        return [item for kept in chain for item in _all_items(kept)]

    def _items(self, owner: str, item_ids: list[str]) -> dict[str, msgspec.Raw]:
        found: dict[str, msgspec.Raw] = {}
        used: list[str] = []
        for item_id in item_ids:
            if item_id in found:
                continue
            row = self._database.execute(
                "SELECT response_id FROM items WHERE owner = ? AND id = ?", (owner, item_id)
            ).fetchone()
            kept = None if row is None else self._find(owner, row[0])
            if kept is None:
                raise ItemNotFoundError(
                    f"item '{item_id[:64]}' is not kept here; send the item itself", param="input"
                )
            found.update(_by_id(_all_items(kept)))
            used.append(kept.id)
        self._touch(used)
        return found

    def _touch(self, response_ids: list[str]) -> None:
        """Note that responses were used, the last one last."""
        with self._writing() as database:
            used = self._next_use()
            database.executemany(
                "UPDATE responses SET used = ? WHERE id = ?",
                [(used + at, response_id) for at, response_id in enumerate(response_ids)],
            )

    def _next_use(self) -> int:
        (last,) = self._database.execute("SELECT MAX(used) FROM responses").fetchone()
        return (last or 0) + 1

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield self._database
        except BaseException:
            self._database.rollback()
            raise
        self._database.commit()


@asynccontextmanager
async def open_store(
    settings: Callable[[], ResponsesConfig],
    wall_clock: Callable[[], float],
    on_change: Callable[[int, int], None],
) -> AsyncIterator[ResponseStore]:
    """Open the store for as long as the context is; arguments as of `ResponseStore`.

    Raises:
        ConfigError: the file cannot be used.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="responses")
    loop = asyncio.get_running_loop()
    try:
        database = await loop.run_in_executor(thread, _open, settings().store_file)
        try:
            store = ResponseStore(database, thread, settings, wall_clock, on_change)
            await store.look()
            yield store
        finally:
            thread.submit(database.close)
    finally:
        thread.shutdown()


def _open(path: str | None) -> sqlite3.Connection:
    try:
        if path is not None:
            # It holds what people said: it is for this user alone from its first moment.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(
            path or ":memory:", timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA recursive_triggers = ON")
        database.executescript(_SCHEMA)
    except (OSError, sqlite3.Error) as exc:
        raise ConfigError(
            f"responses.store_file: {Path(path or ':memory:')} cannot be used: {exc}; name a file "
            "in a folder that this user may write, or leave the key out",
            param="responses.store_file",
        ) from exc
    return database


def _all_items(kept: Kept) -> list[msgspec.Raw]:
    """Return a response's input and output, one item after the other."""
    return [*_items_decoder.decode(kept.items), *_output_decoder.decode(kept.response).output]


def _by_id(items: list[msgspec.Raw]) -> dict[str, msgspec.Raw]:
    found: dict[str, msgspec.Raw] = {}
    for item in items:
        item_id = _identified_decoder.decode(item).id
        if item_id is not None:
            found[item_id] = item
    return found
