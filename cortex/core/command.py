"""How an external engine is started: the command template of one model.

A template is split as a shell would split it and is never given to a shell; `{port}` and the
other placeholders are filled in argument by argument, so that no value can become two arguments.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

PLACEHOLDERS = ("model", "host", "port", "devices", "num_devices", "max_model_len")
# Only a name in braces is a placeholder: JSON in an argument stays as it is.
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")

_Count = Annotated[int, Meta(gt=0)]
_Positive = Annotated[float, Meta(gt=0)]


class CommandModel(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """`[harness.command.models.ID]`: one model that somebody else's server serves.

    Attributes:
        command: the program and its arguments; a string is split into words.
        vram_mb: memory it takes on each of its devices (on the host without GPUs).
        source: what `{model}` stands for; None for the model's id.
        upstream_model: the name the server expects in requests; None asks the server.
        health_path: answers 200 once it can serve; None tries /health, then /v1/models.
        devices: the GPUs it runs on; empty for none, None for the `num_devices` freest.
        context: tokens of the longest sequence.
        continuous_usage: whether its streams are asked for usage with every chunk, as vLLM and
            SGLang can tell it, so that the prompt's count is known at once.
        default_max_tokens: tokens of a chat's answer whose request sets no bound; None leaves it
            to the server.
        max_in_flight: requests it works on at once.
        hang_s: how long it may give no sign of life before it is ended and started again.
        stop_timeout_s: how long it may take to end after SIGTERM.
    """

    command: str | list[str]
    vram_mb: _Count
    source: Annotated[str, Meta(min_length=1)] | None = None
    upstream_model: Annotated[str, Meta(min_length=1)] | None = None
    health_path: Annotated[str, Meta(pattern="^/")] | None = None
    env: dict[str, str] = {}
    cwd: str | None = None
    devices: list[Annotated[int, Meta(ge=0)]] | None = None
    num_devices: _Count = 1
    context: _Count | None = None
    capabilities: list[str] = msgspec.field(default_factory=lambda: ["text"])
    tool_call: bool | None = None
    reasoning: bool | None = None
    continuous_usage: bool = False
    default_max_tokens: _Count | None = None
    max_in_flight: _Count | None = None
    start_timeout_s: _Positive = 1800.0
    stop_timeout_s: Annotated[float, Meta(gt=0, le=300)] = 15.0
    hang_s: _Positive = 60.0

    def __post_init__(self) -> None:
        words = self.words
        if not words or not words[0]:
            raise ValueError("command is empty; name the program that serves the model")
        texts = [*words, *self.env.values()]
        used = self._placeholders
        unknown = sorted(used - set(PLACEHOLDERS))
        if unknown:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"command: {{{unknown[0]}}} is no placeholder; there are {known}")
        if "port" not in used:
            raise ValueError(
                "command: {port} is missing; the server has to listen where it is told to"
            )
        if "max_model_len" in used and self.context is None:
            raise ValueError("command: {max_model_len} needs `context`")
        if any("\0" in text for text in texts):
            raise ValueError("command: no argument can hold a NUL character")
        if any(not name or "=" in name or "\0" in name for name in self.env):
            raise ValueError("env: a name is empty or holds '=' or a NUL character")
        if self.devices is not None and len(set(self.devices)) < len(self.devices):
            raise ValueError("devices: a device is named twice")

    @property
    def words(self) -> list[str]:
        """The program and its arguments with their placeholders.

        Raises:
            ValueError: a quotation mark is not closed.
        """
        if not isinstance(self.command, str):
            return self.command
        try:
            return shlex.split(self.command)
        except ValueError as exc:
            raise ValueError(f"command: {exc} in {self.command!r}") from exc

    @property
    def span(self) -> int:
        """How many devices it spans; 1 on the host."""
        return len(self.devices) or 1 if self.devices is not None else self.num_devices

    @property
    def digest(self) -> str:
        """A short name of how it is started; any other command has another."""
        started = msgspec.json.encode([self.words, sorted(self.env.items()), self.source])
        return hashlib.sha256(started).hexdigest()[:12]

    @property
    def _placeholders(self) -> set[str]:
        texts = [*self.words, *self.env.values()]
        return {name for text in texts for name in _PLACEHOLDER.findall(text)}

    def takes(self, placeholder: str) -> bool:
        """Whether the command has a place for a value."""
        return placeholder in self._placeholders

    def arguments(self, values: Mapping[str, str]) -> list[str]:
        """Return the command with its placeholders filled in."""
        return [_filled(word, values) for word in self.words]

    def environment(self, values: Mapping[str, str]) -> dict[str, str]:
        """Return the variables it sets, with their placeholders filled in."""
        return {name: _filled(text, values) for name, text in self.env.items()}


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)
