"""The harness of external engines: the models of the configuration, each with its command."""

from collections.abc import Callable, Mapping
from pathlib import Path

from cortex.core.command import CommandModel
from cortex.core.config import CommandHarness as Config
from cortex.core.errors import (
    BadRequestError,
    CortexError,
    ModelNotFoundError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.command.engine import CommandEngine
from cortex.neuron.harness import EngineLimits, ModelNotLoadedError
from cortex.neuron.jobs import Job
from cortex.neuron.library import Entry
from cortex.neuron.memory import Placement, Wish
from cortex.neuron.models.source import ModelSource

NOT_LOADED_RETRY_S = 5.0
MIB = 1 << 20


class CommandHarness:
    """Makes engines of configured commands; it meets `neuron.harness.Harness`.

    Args:
        environment: of the engines, before what they add themselves.
        log_dir: where their output is kept.
        clock: monotonic seconds.
    """

    name = "command"

    def __init__(
        self,
        config: Config,
        *,
        environment: Mapping[str, str],
        log_dir: Path,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._environment = environment
        self._log_dir = log_dir
        self._clock = clock
        self._entries = {name: _entry(name, spec) for name, spec in config.models.items()}

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What the configuration names, by id."""
        return self._entries

    def find(self, model_id: str) -> Entry | None:
        """Return the entry of an id."""
        return self._entries.get(model_id)

    async def refresh(self, _: float) -> None:
        """Do nothing: a configuration does not change by itself."""

    def check(self, request: LoadRequest) -> None:
        """Raise for an option that a command cannot meet, or a model without one.

        Raises:
            BadRequestError, UnsupportedFieldError: an option.
            ModelNotFoundError: no command is known for the model.
        """
        spec = self._spec(request)
        for option, value in (("source", request.source), ("quant", request.quant)):
            if value is not None:
                raise UnsupportedFieldError(
                    f"model '{request.model_id}' is served by an external engine: its command in "
                    f"neuron.toml says what is served; leave {option} out",
                    param=option,
                )
        for option in ("tool_format", "constrain_tools"):
            if getattr(request, option) is not None:
                raise UnsupportedFieldError(
                    f"model '{request.model_id}' is served by an external engine, which reads "
                    f"tool calls itself; leave {option} out",
                    param=option,
                )
        num_devices = spec.span
        if (request.tensor_parallel or num_devices) != num_devices:
            raise UnsupportedFieldError(
                f"model '{request.model_id}' runs on {num_devices} device(s), as its "
                "command in neuron.toml says; leave tensor_parallel out",
                param="tensor_parallel",
            )
        if request.devices and len(request.devices) != num_devices and spec.devices is None:
            raise BadRequestError(
                f"model '{request.model_id}' runs on {num_devices} device(s), as its "
                f"command in neuron.toml says, and devices names {len(request.devices)}; in "
                "models.toml, set min_devices to the same",
                param="devices",
            )
        if request.max_model_len is not None and request.max_model_len < 1:
            raise BadRequestError("max_model_len must be at least 1", param="max_model_len")
        if request.max_model_len is not None and not spec.takes("max_model_len"):
            raise UnsupportedFieldError(
                f"the command of model '{request.model_id}' has no {{max_model_len}}; add it or "
                "leave max_model_len out",
                param="max_model_len",
            )

    def missing(self, model_id: str) -> CortexError:
        """Return what a request for a model that is not resident is told."""
        if self.find(model_id) is not None:
            return ModelNotLoadedError(
                f"model '{model_id}' is not loaded; POST /models/load loads it",
                param="model",
                retry_after_s=NOT_LOADED_RETRY_S,
            )
        return ModelNotFoundError(
            f"no external engine is configured for model '{model_id}'; add "
            f'[harness.command.models."{model_id}"] to neuron.toml',
            param="model",
        )

    async def locate(self, request: LoadRequest, _: Job) -> Entry:
        """Return what is to be started."""
        return _entry(request.model_id, self._spec(request))

    def wish(self, entry: Entry, request: LoadRequest) -> Wish:
        """Return what the load asks of memory: the operator's own figure, on each device."""
        spec = _spec_of(entry)
        # Which devices are its own is the operator's to say on the host.
        devices = request.devices if spec.devices is None else spec.devices
        num_bytes = spec.vram_mb * MIB
        return Wish(
            model_id=entry.id,
            gpu_bytes=num_bytes,
            host_bytes=num_bytes,
            devices=devices,
            num_devices=spec.span,
            # What was learned of it holds as long as it is started in the same way.
            dtype=f"command {spec.digest}",
            max_model_len=request.max_model_len or spec.context,
        )

    def make_engine(
        self,
        entry: Entry,
        request: LoadRequest,
        placement: Placement,
        on_end: Callable[[], None],
    ) -> CommandEngine:
        """Return an engine that is not started yet."""
        return CommandEngine(
            entry.id,
            _spec_of(entry),
            harness=self._config,
            devices=placement.gpus,
            environment=self._environment,
            log_dir=self._log_dir,
            clock=self._clock,
            on_end=on_end,
            max_model_len=request.max_model_len,
        )

    def limits(self, entry: Entry) -> EngineLimits:
        """Return what a model may take."""
        admission = self._config.admission
        return EngineLimits(
            load_timeout_s=_spec_of(entry).start_timeout_s,
            max_in_flight=None,
            max_queue_depth=admission.max_queue_depth,
            max_wait_s=admission.max_wait_secs,
        )

    async def open_chat(self, _: Entry) -> None:
        """Return None: an external engine turns messages into tokens itself."""

    def _spec(self, request: LoadRequest) -> CommandModel:
        """Return the command of a model; the configuration's goes before one from the network."""
        entry = self.find(request.model_id)
        if entry is not None:
            return _spec_of(entry)
        if request.command is None:
            raise self.missing(request.model_id)
        if not self._config.allow_remote_commands:
            raise UnsupportedFieldError(
                "this neuron does not run commands that come over the network: put the command of "
                f"model '{request.model_id}' into its neuron.toml, or set allow_remote_commands in "
                "[harness.command] there if everybody who can reach it may run any program",
                param="command",
            )
        return request.command


def _entry(model_id: str, spec: CommandModel) -> Entry:
    source = ModelSource(kind="hf", path=spec.source or model_id)
    return Entry(id=model_id, source=source, command=spec)


def _spec_of(entry: Entry) -> CommandModel:
    assert entry.command is not None
    return entry.command
