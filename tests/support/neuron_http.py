"""A neuron on a real socket, with fake engines or the real one, and a client for it."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from cortex.core.config import (
    Admission,
    CommandHarness,
    DefaultModel,
    Harnesses,
    HarnessName,
    NeuronConfig,
    TorchHarness,
)
from cortex.core.serve import Listener, serve
from cortex.core.trust import Trust
from cortex.neuron.app import open_app
from cortex.neuron.library import BUNDLED_DIR
from cortex.neuron.scope import task_scope
from tests.support.fake_engine import COMMAND
from tests.support.neuron_fakes import FakeProbe

OPEN = Trust()


def add_chat_model(model_dir: Path, name: str) -> Path:
    """Make a model whose tokenizer and template are the bundled model's."""
    path = model_dir / name
    path.mkdir(parents=True)
    for file in BUNDLED_DIR.iterdir():
        if file.is_file():
            (path / file.name).symlink_to(file)
    return path


class Answer:
    """A response, read to its end."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of all events of a stream, decoded; `[DONE]` as text."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else msgspec.json.decode(line) for line in lines]


class Api:
    """A client of one neuron."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, model_dir: Path, shutdown: asyncio.Event
    ) -> None:
        self.session = session
        self.url = url
        self.model_dir = model_dir
        self.shutdown = shutdown

    async def call(self, method: str, path: str, body: object = None, **options: Any) -> Answer:
        raw = body if isinstance(body, bytes) else None if body is None else encode(body)
        data = None if raw is None else io.BytesIO(raw)
        async with self.session.request(method, self.url + path, data=data, **options) as reply:
            return Answer(reply.status, reply.headers, await reply.read())

    async def get(self, path: str) -> Answer:
        return await self.call("GET", path)

    async def post(self, path: str, body: object) -> Answer:
        return await self.call("POST", path, body)

    async def load(self, model_id: str, **options: Any) -> Answer:
        return await self.post("/models/load", {"model_id": model_id, **options})

    async def health_of(self, model_id: str) -> Any:
        models = (await self.get("/health")).json["models"]
        return next((each for each in models if each["id"] == model_id), None)

    async def status_of(self, model_id: str) -> str:
        return str((await self.get(f"/models/{model_id}")).json["status"])


def encode(body: object) -> bytes:
    return msgspec.json.encode(body)


def chat(model: str, text: str = "hello there", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until an awaited condition holds."""
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def neuron(
    tmp_path: Path,
    *,
    engine_command: Sequence[str] = tuple(COMMAND),
    probe: FakeProbe | None = None,
    admission: Admission | None = None,
    default_models: Sequence[DefaultModel] = (),
    max_body_mb: int = 64,
    drain_s: float = 10.0,
    trust: Trust = OPEN,
    command: CommandHarness | None = None,
    harnesses: Sequence[HarnessName] = (),
    **torch: Any,
) -> AsyncIterator[Api]:
    """Run a neuron over `tmp_path/models` on a free port."""
    model_dir = tmp_path / "models"
    model_dir.mkdir(exist_ok=True)
    harness = TorchHarness(
        model_dirs=[str(model_dir)],
        demo_models=False,
        hub=False,
        drain_s=drain_s,
        admission=admission or Admission(),
        **torch,
    )
    config = NeuronConfig(
        state_dir=str(tmp_path / "state"),
        harness=Harnesses(torch=harness, command=command or CommandHarness()),
        harnesses=list(harnesses),
        default_models=list(default_models),
        max_body_mb=max_body_mb,
        **msgspec.structs.asdict(trust),
    )
    shutdown = asyncio.Event()
    bound: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    async with (
        open_app(config, engine_command=engine_command, probe=probe or FakeProbe()) as app,
        task_scope() as tasks,
    ):
        listener = Listener(app=app, host="127.0.0.1", port=0, name="neuron", tls=trust)
        tasks.create_task(
            serve([listener], shutdown=shutdown, drain_s=1.0, on_bound=bound.set_result)
        )
        port = (await bound)[0]
        try:
            async with aiohttp.ClientSession() as session:
                scheme = "http" if trust.tls_cert is None else "https"
                yield Api(session, f"{scheme}://127.0.0.1:{port}", model_dir, shutdown)
        finally:
            shutdown.set()
