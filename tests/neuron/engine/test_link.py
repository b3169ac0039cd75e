import contextlib
import socket
import threading

import pytest

from cortex.neuron.engine.link import EXIT_ORPHANED, LinkClosedError, NeuronLink
from cortex.neuron.engine.protocol import (
    EVENTS,
    MAX_FRAME_BYTES,
    Cancel,
    Progress,
    Shutdown,
    encode_frame,
)


class Ends:
    """Both ends of a link; what would end the process is noted instead."""

    def __init__(self, send_limit_s: float = 5.0) -> None:
        self.neuron, engine = socket.socketpair()
        self.exit_code: int | None = None
        self.process_ended = threading.Event()
        self.link = NeuronLink(engine, send_limit_s=send_limit_s, end_process=self._end)

    def _end(self, code: int) -> None:
        self.exit_code = code
        self.process_ended.set()


@pytest.fixture
def ends():
    with contextlib.ExitStack() as stack:

        def make(**settings) -> Ends:
            made = Ends(**settings)
            stack.callback(made.neuron.close)
            stack.callback(made.link.close)
            return made

        yield make


def test_commands_arrive_in_order_however_they_are_cut(ends):
    both = ends()
    frames = b"".join(encode_frame(Cancel(request_id=i)) for i in range(3))
    received = []
    for i in range(len(frames)):
        both.neuron.sendall(frames[i : i + 1])
    while len(received) < 3:
        received += both.link.receive(wait=True)
    assert [command.request_id for command in received] == [0, 1, 2]


def test_without_commands_an_unwaiting_receive_returns_at_once(ends):
    assert ends().link.receive(wait=False) == []


def test_a_wake_ends_a_waiting_receive_without_a_command(ends):
    both = ends()
    both.link.wake()
    assert both.link.receive(wait=True) == []


def test_an_event_is_sent_as_one_frame(ends):
    both = ends()
    both.link.send(Progress(phase="weights", bytes_done=3, bytes_total=4))
    data = both.neuron.recv(1000)
    assert int.from_bytes(data[:4], "little") == len(data) - 4
    assert EVENTS.decode(data[4:]) == Progress(phase="weights", bytes_done=3, bytes_total=4)


def test_a_closed_socket_wakes_a_waiting_engine(ends):
    both = ends()
    both.neuron.close()
    with pytest.raises(LinkClosedError):
        both.link.receive(wait=True)
    both.link.close()
    assert both.exit_code is None


def test_a_closed_socket_ends_a_process_whose_main_thread_does_not_look(ends):
    both = ends()
    both.neuron.close()
    assert both.process_ended.wait(10)
    assert both.exit_code == EXIT_ORPHANED


def test_shutdown_is_seen_in_the_middle_of_a_load(ends):
    both = ends()
    both.neuron.sendall(encode_frame(Shutdown()))
    with pytest.raises(LinkClosedError):
        both.link.receive(wait=True)
    with pytest.raises(LinkClosedError):
        both.link.check()


@pytest.mark.parametrize(
    "data",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        b"\x01\x00\x00\x00\xc1",
        encode_frame(Cancel(request_id=1))[:-1],
    ],
)
def test_what_is_no_command_ends_the_link(ends, data):
    both = ends()
    both.neuron.sendall(data)
    both.neuron.shutdown(socket.SHUT_WR)
    with pytest.raises(LinkClosedError):
        both.link.receive(wait=True)


def send_many(link: NeuronLink, count: int) -> None:
    for _ in range(count):
        link.send(Progress(phase="starting"))


def test_sending_to_a_neuron_that_is_gone_ends_the_link(ends):
    both = ends()
    both.neuron.close()
    with pytest.raises(LinkClosedError, match="gone"):
        send_many(both.link, 100)


def test_sending_to_a_neuron_that_reads_nothing_gives_up(ends):
    both = ends(send_limit_s=0.05)
    with pytest.raises(LinkClosedError, match="stopped reading"):
        send_many(both.link, 1_000_000)
