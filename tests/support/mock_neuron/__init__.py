"""A neuron without an engine: the real API over real sockets, with behaviour on command."""

from tests.support.mock_neuron.app import MockNeuron
from tests.support.mock_neuron.script import GIB, MockModel, Seen

__all__ = ["GIB", "MockModel", "MockNeuron", "Seen"]
