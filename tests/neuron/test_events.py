import asyncio
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest

from cortex.core.neuron_api import (
    Discovery,
    ModelInfo,
    NeuronHealth,
    NeuronSnapshot,
    Version,
)
from cortex.core.sse import SseSplitter
from cortex.neuron import events as events_module
from cortex.neuron.events import PING, EventHub, TooManySubscribersError
from tests.support.fake_engine import write_script
from tests.support.neuron_http import add_chat_model, chat, neuron


class FakeViews:
    """Models that change when a test says so."""

    def __init__(self):
        self.infos = {}
        self.listing = {}

    def residents(self):
        return list(self.infos.values())

    def model(self, model_id):
        return self.infos.get(model_id)

    def listings(self):
        return [self.listing]

    def loads(self):
        return []

    def health(self):
        return NeuronHealth(uptime_secs=1)

    def snapshot(self):
        return NeuronSnapshot(
            models=self.residents(),
            health=self.health(),
            discovery=Discovery(hostname="h"),
            version=Version(package_version="1"),
        )


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


class Hub:
    """A hub over fake views, looked at once so that what follows is new."""

    def __init__(self):
        self.views = FakeViews()
        self.ending = asyncio.Event()
        self.hub = EventHub(self.views, clock=Clock())
        self.hub.publish()

    def move(self, model_id, status):
        self.views.infos[model_id] = ModelInfo(id=model_id, harness="torch", status=status)
        self.hub.changed(model_id)
        self.hub.publish()

    def stream(self, last_id=None):
        return aclosing(self.hub.stream(last_id, self.ending))


def parse(raw):
    lines = dict(line.split(": ", 1) for line in raw.decode().strip().split("\n"))
    return lines["id"], lines["event"], msgspec.json.decode(lines["data"])


async def take(stream):
    """Return the next event that is no ping."""
    while True:
        raw = await anext(stream)
        if raw != PING:
            return parse(raw)


async def test_a_new_subscriber_begins_with_a_snapshot_and_hears_what_follows():
    it = Hub()
    it.move("a", "loaded")
    async with it.stream() as stream:
        first_id, name, data = await take(stream)
        assert name == "snapshot"
        assert [each["status"] for each in data["models"]] == ["loaded"]
        assert sorted(data) == ["discovery", "health", "models", "version"]
        it.move("a", "draining")
        next_id, name, data = await take(stream)
        assert (name, data["status"]) == ("model", "draining")
        epoch, number = first_id.split("-")
        assert next_id == f"{epoch}-{int(number) + 1}"


async def test_who_comes_back_gets_what_it_missed_and_no_snapshot():
    it = Hub()
    async with it.stream() as stream:
        last_id, _, _ = await take(stream)
    it.move("a", "loading")
    it.move("a", "loaded")
    async with it.stream(last_id) as stream:
        seen = [(await take(stream))[2]["status"] for _ in range(2)]
    assert seen == ["loading", "loaded"]


@pytest.mark.parametrize("last_id", ["", "other-1", "{epoch}-0", "{epoch}-999", "{epoch}-x", "-1"])
async def test_an_id_that_cannot_be_followed_gets_a_snapshot(last_id, monkeypatch):
    monkeypatch.setattr(events_module, "RING_EVENTS", 2)
    it = Hub()
    it.hub._ring = type(it.hub._ring)(maxlen=2)
    for status in ("loading", "loaded", "draining"):
        it.move("a", status)
    async with it.stream(last_id.format(epoch=it.hub._epoch)) as stream:
        assert (await take(stream))[1] == "snapshot"


async def test_a_model_that_leaves_the_listing_is_removed():
    it = Hub()
    it.move("a", "unloaded")
    async with it.stream() as stream:
        await take(stream)
        it.views.infos.clear()
        it.views.listing = {}
        it.hub.publish()
        _, name, data = await take(stream)
        assert (name, data) == ("model_removed", {"id": "a"})


async def test_a_subscriber_that_does_not_read_is_closed_with_a_word_in_the_log(
    monkeypatch, caplog
):
    monkeypatch.setattr(events_module, "MAX_QUEUED_EVENTS", 3)
    it = Hub()
    async with it.stream() as slow, it.stream() as quick:
        for each in (slow, quick):
            assert (await take(each))[1] == "snapshot"
        with caplog.at_level("WARNING"):
            for number in range(4):
                it.move("a", "loaded" if number % 2 else "loading")
                await take(quick)
        with pytest.raises(StopAsyncIteration):
            await anext(slow)
        it.move("a", "draining")
        assert (await take(quick))[2]["status"] == "draining"
    assert caplog.text.count("reads too slowly") == 1


async def test_subscribers_are_bounded_and_a_place_comes_free(monkeypatch):
    monkeypatch.setattr(events_module, "MAX_SUBSCRIBERS", 1)
    it = Hub()
    async with it.stream() as stream:
        await take(stream)
        with pytest.raises(TooManySubscribersError) as caught:
            async with it.stream() as other:
                await anext(other)
        assert (caught.value.status, caught.value.retry_after_s) == (503, 5.0)
    async with it.stream() as stream:
        await take(stream)


async def test_at_the_end_subscribers_are_told_that_the_node_drains_and_the_stream_ends():
    it = Hub()
    async with it.stream() as one, it.stream() as other:
        for each in (one, other):
            await take(each)
        it.ending.set()
        for each in (one, other):
            _, name, data = await take(each)
            assert (name, data["status"]) == ("node", "draining")
            with pytest.raises(StopAsyncIteration):
                await anext(each)


@asynccontextmanager
async def subscribed(api, last_id=None):
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    splitter, queue = SseSplitter(), []
    async with api.session.get(api.url + "/events", headers=headers) as reply:
        assert reply.status == 200

        async def following():
            while not queue:
                found = splitter.feed(await reply.content.readany())
                queue.extend(each for each in found if not each.is_comment)
            event = queue.pop(0)
            return event.name.decode(), msgspec.json.decode(event.data)

        yield following


async def test_a_load_and_a_request_are_seen_as_they_happen(tmp_path):
    path = add_chat_model(tmp_path / "models", "m")
    write_script(path, load_s=1.2)
    async with neuron(tmp_path) as api:
        async with subscribed(api) as following:
            name, data = await following()
            assert name == "snapshot"
            [info] = [each for each in data["models"] if each["id"] == "m"]
            assert (info["status"], data["health"]["status"]) == ("unloaded", "ok")
            assert data["health"]["host"] == {"free_bytes": 64 << 30, "total_bytes": 64 << 30}
            await api.load("m")
            statuses, loads, phases = [], [], set()
            await api.post("/v1/chat/completions", chat("m", max_tokens=3))
            while not loads or loads[-1]["num_requests"] < 1:
                name, data = await following()
                if name == "model" and data["id"] == "m":
                    statuses.append(data["status"])
                    phases.add((data["progress"] or {}).get("phase"))
                elif name == "load":
                    loads += data
            assert list(dict.fromkeys(statuses)) == ["loading", "loaded"]
            assert "weights" in phases


async def test_every_model_tells_what_it_needs(tmp_path):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        await api.load("m")
        info = (await api.get("/models/m")).json
        assert info["cache_bytes"] == 2000
        # The weights in float32, the caches and 400 MiB for the process.
        assert info["need_bytes"] > info["weight_bytes"] + (400 << 20)
        needed = info["need_bytes"]
        await api.post("/models/unload", {"model_id": "m"})
        info = (await api.get("/models/m")).json
        assert (info["need_bytes"], info["cache_bytes"]) == (needed, None)


async def test_too_many_subscribers_get_a_503_and_when_to_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr(events_module, "MAX_SUBSCRIBERS", 1)
    async with neuron(tmp_path) as api:
        async with subscribed(api) as following:
            await following()
            answer = await api.get("/events")
            assert (answer.status, answer.error["code"]) == (503, "too_many_subscribers")
            assert answer.headers["retry-after"] == "5"


async def test_silence_is_filled_with_pings(tmp_path):
    async with neuron(tmp_path) as api, api.session.get(api.url + "/events") as reply:
        seen = b""
        while seen.count(b": ping\n\n") < 3:
            seen += await reply.content.readany()
        assert seen.count(b"event: snapshot") == 1


async def test_when_the_neuron_ends_it_says_so_and_ends_the_stream(tmp_path):
    async with neuron(tmp_path) as api, api.session.get(api.url + "/events") as reply:
        await reply.content.readuntil(b"\n\n")
        api.shutdown.set()
        rest = await reply.content.read()
        assert b'"status":"draining"' in rest.rpartition(b"event: node")[2]


@pytest.mark.parametrize("where", ["header", "query"])
async def test_who_comes_back_over_http_misses_nothing(tmp_path, where):
    add_chat_model(tmp_path / "models", "m")
    async with neuron(tmp_path) as api:
        async with api.session.get(api.url + "/events") as reply:
            seen = b""
            while b"event: snapshot" not in seen:
                seen += await reply.content.readuntil(b"\n\n")
            last_id = seen.partition(b"id: ")[2].partition(b"\n")[0].decode()
        await api.load("m")
        options = (
            {"headers": {"Last-Event-ID": last_id}}
            if where == "header"
            else {"params": {"last_event_id": last_id}}
        )
        async with api.session.get(api.url + "/events", **options) as reply:
            seen = b""
            while b'"status":"loaded"' not in seen:
                seen += await reply.content.readuntil(b"\n\n")
            assert b"event: snapshot" not in seen
            assert b'"status":"loading"' in seen
