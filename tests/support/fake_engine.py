"""An engine process without torch: speaks the protocol and does what a script tells it.

The script is `script.json` in the model's directory (see `Script`); each start adds a line with
its process id to `starts` there. A request's answer is its own prompt, one token per step; a text's
vector is its first token, its last one and their number.
"""

import argparse
import os
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import msgspec

from cortex.neuron.engine.protocol import (
    COMMANDS,
    Cancel,
    Embed,
    EngineStats,
    Loaded,
    LoadFailed,
    LoadModel,
    Progress,
    Shutdown,
    StepDone,
    Submit,
    TokenEvent,
    encode_frame,
)

COMMAND = [sys.executable, "-m", "tests.support.fake_engine"]


class Script(msgspec.Struct, kw_only=True):
    """What the fake does.

    Attributes:
        load_s: how long a load takes; it reports progress meanwhile.
        fail: code of the LoadFailed that ends a load.
        die_loading: exit code with which the first `die_starts` starts end while they load.
        gap_s: pause between two steps.
        repeat: how often the prompt is repeated in the answer.
        die_on_id: kills itself when a prompt holds this token.
        stubborn: ignores Shutdown and SIGTERM.
        garbage_on_id: sends a frame that is none when a prompt holds this token.
        hang_up_on_id: closes its connection when a prompt holds this token, and lives on.
        burst: tokens per step.
        words: printed at the start.
    """

    load_s: float = 0.0
    fail: str | None = None
    die_loading: int | None = None
    die_starts: int = 1_000
    gap_s: float = 0.0
    repeat: int = 1
    die_on_id: int | None = None
    stubborn: bool = False
    garbage_on_id: int | None = None
    hang_up_on_id: int | None = None
    burst: int = 1
    words: str = "fake engine here"
    max_num_seqs: int = 4
    max_model_len: int = 4096


def write_script(directory: Path, **values: object) -> None:
    """Put a script into a model's directory."""
    script = Script(**values)  # type: ignore[arg-type]
    (directory / "script.json").write_bytes(msgspec.json.encode(script))


def starts(directory: Path) -> list[int]:
    """Return the process ids of all starts for a model's directory."""
    path = directory / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def _read_script(directory: Path) -> Script:
    path = directory / "script.json"
    return msgspec.json.decode(path.read_bytes(), type=Script) if path.exists() else Script()


class _Fake:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.script = Script()
        self.running: dict[int, tuple[Submit, int]] = {}
        self.texts: dict[int, Embed] = {}

    def send(self, message: object) -> None:
        self.connection.sendall(encode_frame(message))  # type: ignore[arg-type]

    def commands(self, *, wait_s: float | None) -> list[object]:
        found = []
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            if selector.select(wait_s):
                data = self.connection.recv(1 << 20)
                if not data:
                    sys.exit(0)
                self.buffer += data
        while len(self.buffer) >= 4:
            size = int.from_bytes(self.buffer[:4], "little")
            if len(self.buffer) < 4 + size:
                break
            found.append(COMMANDS.decode(self.buffer[4 : 4 + size]))
            self.buffer = self.buffer[4 + size :]
        return found

    def load(self, command: LoadModel) -> None:
        directory = Path(command.source.path)
        with (directory / "starts").open("a") as file:
            file.write(f"{os.getpid()}\n")
        script = self.script = _read_script(directory)
        sys.stdout.write(f"{script.words}\n")
        sys.stdout.flush()
        if script.stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if script.die_loading is not None and len(starts(directory)) <= script.die_starts:
            sys.stderr.write("RuntimeError: scripted death\n")
            sys.exit(script.die_loading)
        self.send(Progress(phase="weights", bytes_done=50, bytes_total=100))
        time.sleep(script.load_s)
        if script.fail is not None:
            self.send(LoadFailed(code=script.fail, message="scripted failure"))  # type: ignore[arg-type]
            sys.exit(1)
        self.send(
            Loaded(
                max_model_len=command.max_model_len or script.max_model_len,
                vocab_size=1000,
                max_num_seqs=script.max_num_seqs,
                num_kv_blocks=100,
                block_size=32,
                weight_bytes=1000,
                cache_bytes=2000,
                torch_version="none",
                device=command.device,
                dtype="float32",
            )
        )

    def stats(self) -> EngineStats:
        running = len(self.running) + len(self.texts)
        return EngineStats(
            num_running=running,
            free_slots=max(0, self.script.max_num_seqs - running),
            free_blocks=100 - running,
            tok_s_prefill=1000.0,
            tok_s_decode=50.0,
        )

    def take(self, command: object) -> None:
        match command:
            case LoadModel():
                self.load(command)
            case Submit():
                if self.script.die_on_id in command.prompt_ids:
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.script.garbage_on_id in command.prompt_ids:
                    self.connection.sendall(b"\x03\x00\x00\x00\xc1\xc1\xc1")
                if self.script.hang_up_on_id in command.prompt_ids:
                    self.connection.close()
                    signal.pause()
                self.running[command.request_id] = (command, 0)
            case Embed():
                if self.script.die_on_id in command.prompt_ids:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.texts[command.request_id] = command
            case Cancel():
                request_id = command.request_id
                if self.running.pop(request_id, None) or self.texts.pop(request_id, None):
                    event = TokenEvent(request_id=command.request_id, finish="cancelled")
                    self.send(StepDone(events=[event], stats=self.stats()))
            case Shutdown():
                if not self.script.stubborn:
                    sys.exit(0)

    def step(self) -> None:
        events = []
        if self.texts:
            # One text a step, the latest first.
            request_id, embed = self.texts.popitem()
            ids = embed.prompt_ids
            vector = struct.pack("<3f", ids[0], ids[-1], len(ids))
            events.append(TokenEvent(request_id=request_id, finish="stop", vector=vector))
        for request_id, (submit, at) in list(self.running.items()):
            answer = (submit.prompt_ids * self.script.repeat)[: submit.max_tokens]
            end = min(at + self.script.burst, len(answer))
            finish = None
            if end == len(answer):
                finish = "length" if end == submit.max_tokens else "stop"
                del self.running[request_id]
            else:
                self.running[request_id] = (submit, end)
            events.append(
                TokenEvent(request_id=request_id, token_ids=answer[at:end], finish=finish)
            )
        self.send(StepDone(events=events, stats=self.stats()))
        time.sleep(self.script.gap_s)

    def run(self) -> None:
        while True:
            has_work = self.running or self.texts
            for command in self.commands(wait_s=0.0 if has_work else None):
                self.take(command)
            if self.running or self.texts:
                self.step()


def main() -> None:
    """Connect and serve until the neuron ends it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(parser.parse_args().socket)
    _Fake(connection).run()


if __name__ == "__main__":
    main()
