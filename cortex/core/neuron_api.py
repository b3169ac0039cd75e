"""Wire structs of the neuron's HTTP API, shared by the neuron (server) and the gateway (client).

Structs grow only by fields with defaults, so that a gateway and a neuron of different versions
understand each other. An absent value means unknown, never bad. Memory is in MiB where a name
ends in `_mb` (the original's contract) and in bytes elsewhere.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cortex.core.command import CommandModel

ModelStatus = Literal["unloaded", "loading", "loaded", "recovering", "failed", "draining"]
LoadPhase = Literal["starting", "download", "weights", "caches", "warmup"]

# A node may report statuses that this version does not know; they read as `unloaded`.
MODEL_STATUSES: frozenset[str] = frozenset(
    ["unloaded", "loading", "loaded", "recovering", "failed", "draining"]
)


# The capability of a model that takes images.
VISION = "vision"


class Version(msgspec.Struct, kw_only=True, frozen=True):
    """`GET /version`."""

    package_version: str
    git_sha: str = "unknown"
    git_sha_long: str = "unknown"
    git_dirty: bool = False
    build_timestamp: str = "unknown"
    python_version: str = ""
    torch_version: str = ""
    target: str = ""
    features: list[str] = []


class Device(msgspec.Struct, kw_only=True, frozen=True):
    """One accelerator as NVML describes it."""

    index: int
    name: str
    vram_total_mb: int
    compute_capability: str = ""


class Discovery(msgspec.Struct, kw_only=True, frozen=True):
    """`GET /discovery`: what this host is; taken once at start."""

    hostname: str
    os: str = ""
    kernel: str = ""
    cuda_version: str | None = None
    driver_version: str | None = None
    devices: list[Device] = []
    harnesses: list[str] = []
    cuda_unavailable_reason: str | None = None
    max_prompt_tokens: int = 0
    memory_total_mb: int = 0


class DeviceHealth(msgspec.Struct, kw_only=True, frozen=True):
    """One device's last reading.

    `free_bytes` is what a load could still take: free and not promised to another.
    """

    index: int
    vram_used_mb: int
    vram_free_mb: int
    utilization_pct: int = 0
    temp_c: int = 0
    free_bytes: int | None = None
    total_bytes: int | None = None


class HostMemory(msgspec.Struct, kw_only=True, frozen=True):
    """The host's own memory, where models go that run on the CPU; `free_bytes` as of a device."""

    free_bytes: int
    total_bytes: int


class FailedActivation(msgspec.Struct, kw_only=True, frozen=True):
    """A default model that could not be loaded at start."""

    model_id: str
    error: str


class RetriedActivation(msgspec.Struct, kw_only=True, frozen=True):
    """A default model that is tried again, since what it needs could not be reached."""

    model_id: str
    error: str
    attempts: int


class Activation(msgspec.Struct, kw_only=True, frozen=True):
    """Progress of the default models named in neuron.toml; `retried` ones are `pending` too."""

    state: Literal["pre_warming", "ready"]
    pending: list[str] = []
    in_progress: str | None = None
    completed: list[str] = []
    failed: list[FailedActivation] = []
    retried: list[RetriedActivation] = []


class ModelLoad(msgspec.Struct, kw_only=True, frozen=True):
    """One resident model's work in hand and its measured rates (tokens per second).

    `num_requests` counts those begun since the model was loaded, `last_used_s` is the time since
    the last one, None if there was none.
    """

    id: str
    in_flight: int = 0
    queue_depth: int = 0
    max_in_flight: int = 0
    max_queue_depth: int = 0
    free_slots: int = 0
    free_kv_blocks: int = 0
    cached_kv_blocks: int = 0  # those of them whose content a prompt could go on from
    kept_states: int = 0
    total_kv_blocks: int = 0
    rejected_queue_full: int = 0
    rejected_timeout: int = 0
    tok_s_prefill: float = 0.0
    tok_s_decode: float = 0.0
    num_requests: int = 0
    last_used_s: float | None = None


class NeuronHealth(msgspec.Struct, kw_only=True, frozen=True):
    """`GET /health`: answers from memory, never waits for a device."""

    uptime_secs: int
    status: Literal["ok", "draining"] = "ok"
    devices: list[DeviceHealth] = []
    host: HostMemory | None = None
    activation: Activation | None = None
    models: list[ModelLoad] = []
    cycles: int = 0  # loads and unloads since the process started


class Limit(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Token limits of a model; absent means unknown."""

    context: int | None = None
    input: int | None = None
    output: int | None = None


class Cost(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """USD per million tokens; absent means not priced, 0.0 means free."""

    input: float | None = None
    output: float | None = None
    cache_read: float | None = None
    cache_write: float | None = None


class Servable(msgspec.Struct, kw_only=True, frozen=True):
    """Whether a resident model can take requests, and why not."""

    ok: bool
    reason: str | None = None
    detail: str | None = None


class LoadProgress(msgspec.Struct, kw_only=True, frozen=True):
    """Where a load stands."""

    phase: LoadPhase = "starting"
    bytes_done: int = 0
    bytes_total: int = 0
    seconds_left: float | None = None


class ModelInfo(msgspec.Struct, kw_only=True, frozen=True):
    """One model this neuron serves or could serve (`GET /models`, `GET /models/{id}`).

    Attributes:
        need_bytes: what it holds, or what a load would ask of the devices of this host: weights,
            the least useful cache and the process; on all of them together.
        num_devices: how many devices it spans.
        cache_bytes: the caches of a loaded model.
        resident_s: seconds since its engine was ready, None while it has none.
        ttl_s, min_resident_s, pinned, priority: what its load asked for.
        idle_unload_in_s: when it is unloaded unless a request comes, None if it is not.
        evictable_in_s: when its minimum residency ends, 0.0 if it is over.
        engine_cycles: loads and unloads on this host since its engine started.
        prefix_match: where a cached prefix may end: at any `block`, or only at a `snapshot` of
            the state (message ends, prompt ends); None where nothing is cached or nobody says.
    """

    id: str
    harness: str
    status: str
    devices: list[int] = []
    vram_used_mb: int | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    need_bytes: int | None = None
    num_devices: int = 1
    capabilities: list[str] = []
    limit: Limit | None = None
    cost: Cost | None = None
    tool_call: bool | None = None
    reasoning: bool | None = None
    servable: Servable | None = None
    progress: LoadProgress | None = None
    error: str | None = None
    in_flight: int = 0
    last_used_s: float | None = None  # seconds since the last request, None if never used
    resident_s: float | None = None
    idle_unload_in_s: float | None = None
    evictable_in_s: float | None = None
    engine_cycles: int | None = None
    ttl_s: float | None = None
    min_resident_s: float = 0.0
    pinned: bool = False
    priority: int | None = None
    prefix_match: Literal["block", "snapshot"] | None = None


# How models write tool calls; docs/api.md has an example of each.
ToolFormat = Literal["qwen_xml", "hermes", "llama3", "mistral", "mistral_list"]


class LoadRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of `POST /models/load`.

    Attributes:
        ttl_s: unload it after so long without a request; None takes the neuron's default, 0
            keeps it.
        min_resident_s: refuse to evict it before it was loaded for so long.
        pinned: never evict it, and never unload it for idleness.
        priority: what `evict` may displace, and who may displace it; 100 if not given.
        evict: residents that make room; all of them leave, or none. Those at work are waited for.
        tool_format: how the model writes tool calls; None takes what its chat template tells.
        constrain_tools: hold its tool calls to the declared tools; None takes the neuron's default.
    """

    model_id: str
    harness: str | None = None
    source: str | None = None
    quant: str | None = None
    tensor_parallel: int | None = None
    devices: list[int] | None = None
    max_model_len: int | None = None
    command: CommandModel | None = None
    evict: list[str] = []
    wait: bool = True
    ttl_s: Annotated[float, Meta(ge=0)] | None = None
    min_resident_s: Annotated[float, Meta(ge=0)] = 0.0
    pinned: bool = False
    priority: int | None = None
    tool_format: ToolFormat | None = None
    constrain_tools: bool | None = None


class LoadResponse(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `POST /models/load`: 200 `loaded`, or 202 `loading` when `wait` is false."""

    status: Literal["loaded", "loading"]
    model_id: str
    progress: LoadProgress | None = None
    load_s: float | None = None
    evicted: list[str] = []
    drained: list[str] = []  # those of `evicted` that had requests in hand, which ended well


class UnloadRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of `POST /models/unload`."""

    model_id: str


class UnloadResponse(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `POST /models/unload`."""

    status: Literal["unloaded"]
    model_id: str


class RecycleRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of `POST /models/recycle`."""

    model_id: str


class RecycleResponse(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `POST /models/recycle`: the engine was ended, started again and serves."""

    status: Literal["recycled"]
    model_id: str
    load_s: float | None = None


class Endpoint(msgspec.Struct, kw_only=True, frozen=True):
    """`GET /models/{id}/endpoint`: where to send requests for a loaded model."""

    url: str


# What `GET /events` sends. Every event has an id `<epoch>-<n>`: the epoch is random and as long
# as the process lives, n counts up. Whoever comes back with the last id it saw gets what
# followed; who comes without one, or too late, begins with a snapshot.
EventName = Literal["snapshot", "model", "model_removed", "load", "node"]


class NeuronSnapshot(msgspec.Struct, kw_only=True, frozen=True):
    """Data of a `snapshot` event: everything that later events change."""

    models: list[ModelInfo]
    health: NeuronHealth
    discovery: Discovery
    version: Version


class ModelRemoved(msgspec.Struct, kw_only=True, frozen=True):
    """Data of a `model_removed` event: neither resident nor servable any more.

    Of the others, `model` carries a ModelInfo, `load` a list of the ModelLoads that changed, and
    `node` a NeuronHealth.
    """

    id: str
