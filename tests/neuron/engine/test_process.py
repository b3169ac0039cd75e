"""Engine processes over real sockets, with tiny checkpoints."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from cortex.neuron.engine.protocol import (
    EVENTS,
    Cancel,
    Command,
    Constraint,
    Event,
    Loaded,
    LoadFailed,
    LoadModel,
    Progress,
    Shutdown,
    StepDone,
    Submit,
    encode_frame,
)
from cortex.neuron.models.source import ModelSource
from tests.support import checkpoints

START_LIMIT_S = 60
PROMPT = [5, 9, 300, 42, 77]


class Neuron:
    """The neuron's end of an engine process."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self.connection = connection
        self._stream = connection.makefile("rb")

    def send(self, command: Command) -> None:
        self.connection.sendall(encode_frame(command))

    def receive(self) -> Event:
        size = int.from_bytes(self._stream.read(4), "little")
        return EVENTS.decode(self._stream.read(size))

    def load(self, path: str, **settings) -> tuple[list[Progress], Loaded | LoadFailed]:
        self.send(LoadModel(source=ModelSource(kind="hf", path=path), **settings))
        progress = []
        while isinstance(event := self.receive(), Progress):
            progress.append(event)
        return progress, event

    def run(self, *request_ids: int) -> dict[int, list[int]]:
        """Read steps until all of some sequences have ended; return their tokens."""
        tokens: dict[int, list[int]] = {request_id: [] for request_id in request_ids}
        left = set(request_ids)
        while left:
            done = self.receive()
            for event in done.events:
                tokens[event.request_id] += event.token_ids
                if event.finish is not None:
                    left.remove(event.request_id)
        return tokens

    def close(self) -> None:
        self._stream.close()
        self.connection.close()


@contextlib.contextmanager
def engine_process(directory) -> Iterator[Neuron]:
    with socket.socket(socket.AF_UNIX) as listener:
        path = directory / "engine.sock"
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(START_LIMIT_S)
        command = [sys.executable, "-m", "cortex.neuron.engine.process", "--socket", str(path)]
        with (
            (directory / "engine.log").open("wb") as log,
            subprocess.Popen(command, stderr=log) as process,
        ):
            neuron = None
            try:
                connection, _ = listener.accept()
                connection.settimeout(START_LIMIT_S)
                neuron = Neuron(process, connection)
                yield neuron
            finally:
                process.kill()
                if neuron is not None:
                    neuron.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3_5")
    return directory, checkpoints.qwen3_5_text(directory)


def reference(model, prompt: list[int], count: int) -> list[int]:
    """transformers' greedy tokens."""
    token_ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([token_ids])).logits[0, -1]
        token_ids.append(int(logits.argmax()))
    return token_ids[len(prompt) :]


def test_an_engine_loads_a_checkpoint_and_serves_it_until_it_is_shut_down(tmp_path, checkpoint):
    directory, model = checkpoint
    with engine_process(tmp_path) as neuron:
        progress, loaded = neuron.load(str(directory), max_model_len=200, max_num_seqs=4)
        assert {event.phase for event in progress} == {"starting", "weights", "caches", "warmup"}
        weights = [event for event in progress if event.phase == "weights"]
        assert weights[-1].bytes_done == weights[-1].bytes_total > 0
        assert (loaded.max_model_len, loaded.vocab_size, loaded.max_num_seqs) == (200, 500, 4)
        assert (loaded.device, loaded.dtype, loaded.block_size) == ("cpu", "float32", 32)
        assert loaded.num_kv_blocks == 4 * 7
        long_prompt = [(i * 37) % 500 for i in range(150)]
        prompts = {1: PROMPT, 2: long_prompt, 3: [7], 4: PROMPT[::-1], 5: [1, 2, 3], 6: PROMPT}
        for request_id, prompt in prompts.items():
            neuron.send(Submit(request_id=request_id, prompt_ids=prompt, max_tokens=10))
        tokens = neuron.run(*prompts)
        for request_id, prompt in prompts.items():
            assert tokens[request_id] == reference(model, prompt, 10), request_id

        neuron.send(Submit(request_id=7, prompt_ids=PROMPT, max_tokens=190))
        assert neuron.receive().stats.num_running == 1
        neuron.send(Cancel(request_id=7))
        while not (last := neuron.receive()).events or last.events[0].finish is None:
            pass
        assert last.events[0].finish == "cancelled"
        assert last.stats.free_slots == 4
        assert last.stats.free_blocks == 28
        assert last.stats.tok_s_prefill > 0
        assert last.stats.tok_s_decode > 0

        neuron.send(Shutdown())
        assert neuron.process.wait(10) == 0


def test_a_grammar_compiled_beside_an_idle_engine_is_followed(tmp_path, checkpoint):
    directory, _ = checkpoint
    checkpoints.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    asked = Constraint(lark="start: /[ab]{5}/", tokenizer_path=str(path))
    with engine_process(tmp_path) as neuron:
        neuron.load(str(directory), max_model_len=200, max_num_seqs=4)
        for request_id in (1, 2):
            command = Submit(
                request_id=request_id, prompt_ids=PROMPT, max_tokens=50, constraint=asked
            )
            neuron.send(command)
            token_ids = neuron.run(request_id)[request_id]
            text = Tokenizer.from_file(str(path)).decode(token_ids)
            assert (len(text), set(text) <= {"a", "b"}) == (5, True)


def test_a_killed_engine_closes_its_socket_at_once(tmp_path, checkpoint):
    with engine_process(tmp_path) as neuron:
        neuron.load(str(checkpoint[0]), max_model_len=200)
        neuron.send(Submit(request_id=1, prompt_ids=PROMPT, max_tokens=190))
        assert isinstance(neuron.receive(), StepDone)
        neuron.process.kill()
        with contextlib.suppress(ConnectionResetError):
            while neuron.connection.recv(1 << 16):
                pass
        assert neuron.process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("busy", [False, True])
def test_an_engine_ends_when_its_neuron_is_gone(tmp_path, checkpoint, busy):
    with engine_process(tmp_path) as neuron:
        neuron.load(str(checkpoint[0]))
        if busy:
            neuron.send(Submit(request_id=1, prompt_ids=PROMPT, max_tokens=4000))
            neuron.receive()
        neuron.close()
        assert neuron.process.wait(10) in {0, 3}


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_an_engine_and_sigint_does_not(tmp_path, checkpoint, busy):
    with engine_process(tmp_path) as neuron:
        neuron.load(str(checkpoint[0]))
        neuron.process.send_signal(signal.SIGINT)
        neuron.send(Submit(request_id=1, prompt_ids=PROMPT, max_tokens=2))
        assert len(neuron.run(1)[1]) == 2
        if busy:
            neuron.send(Submit(request_id=2, prompt_ids=PROMPT, max_tokens=4000))
            neuron.receive()
        neuron.process.send_signal(signal.SIGTERM)
        assert neuron.process.wait(10) == 0


def test_a_bad_checkpoint_is_named_and_ends_the_process(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with engine_process(tmp_path) as neuron:
        _, failed = neuron.load(str(broken))
        assert failed.code == "unreadable_checkpoint"
        assert str(broken) in failed.message
        assert neuron.process.wait(10) == 1


def test_a_load_without_memory_says_what_is_needed(tmp_path, checkpoint):
    with engine_process(tmp_path) as neuron:
        _, failed = neuron.load(str(checkpoint[0]), cache_bytes=1)
        assert failed.code == "out_of_memory"
        assert "the caches need" in failed.message
        assert "bytes) are free" in failed.message
        assert neuron.process.wait(10) == 1


def test_a_device_that_is_not_there_fails_the_load_in_one_line(tmp_path, checkpoint):
    with engine_process(tmp_path) as neuron:
        _, failed = neuron.load(str(checkpoint[0]), device="cuda:99")
        assert failed.code == "internal"
        assert "cuda:99" in failed.message
        assert "\n" not in failed.message
        assert neuron.process.wait(10) == 1


def test_a_process_without_a_neuron_says_so():
    command = [sys.executable, "-m", "cortex.neuron.engine.process", "--socket", "/nowhere/x.sock"]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert b"no neuron at /nowhere/x.sock" in ended.stderr
    assert b"Traceback" not in ended.stderr
