"""What the gateway has learned of how fast its nodes are, per node and model.

A figure that a neuron measures itself is preferred, then what this gateway has seen, then a guess
from the description of the node's devices. Only `RateBook.learn_...` changes anything.
"""

from collections import OrderedDict
from dataclasses import dataclass

from cortex.gateway.fleet import NodeView

MAX_LEARNED = 1024  # (node, model) pairs; the one unused for longest is forgotten

# Memory bandwidth in GB/s by a piece of the device's name, longest first, then by generation.
_BANDWIDTH_BY_NAME = (
    ("H200", 4800.0),
    ("B200", 8000.0),
    ("H100", 3350.0),
    ("A100", 1900.0),
    ("5090", 1790.0),
    ("4090", 1008.0),
    ("3090", 936.0),
    ("L40", 864.0),
    ("4080", 716.0),
    ("A10", 600.0),
    ("3060", 360.0),
    ("T4", 320.0),
)
_BANDWIDTH_BY_GENERATION = {"12": 900.0, "10": 8000.0, "9": 3350.0, "8": 700.0, "7": 500.0}
_UNKNOWN_GPU = 400.0
_HOST = 20.0
# A token's prefill reads the weights once for many tokens; so much faster than decoding one.
_PREFILL_PER_DECODE_GPU = 60.0
_PREFILL_PER_DECODE_HOST = 15.0

ASSUMED_WEIGHT_BYTES = 8 << 30
LOAD_START_S = 3.0
LOAD_BYTES_S = 1e9
DOWNLOAD_BYTES_S = 1e8
SERVICE_S = 2.0

_WEIGHT_OF_NEW = 0.3
# A prefill that had to wait looks slow, so samples below the known rate count little.
_WEIGHT_OF_SLOWER = 0.05
MIN_PREFILL_SAMPLE_TOKENS = 256
_GB = 1e9


@dataclass(slots=True)
class _Learned:
    """What was seen of one model on one node; None until it was."""

    prefill_tok_s: float | None = None
    load_s: float | None = None
    service_s: float | None = None


class RateBook:
    """Learned rates, bounded; reading one never changes it."""

    def __init__(self, max_learned: int = MAX_LEARNED) -> None:
        self._max_learned = max_learned
        self._learned: OrderedDict[tuple[str, str], _Learned] = OrderedDict()
        self._load_bytes_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._learned)

    def prefill_tok_s(self, node: NodeView, model_id: str) -> float:
        """Return how many prompt tokens a second the node prefills."""
        load = node.loads.get(model_id)
        if load is not None and load.tok_s_prefill > 0:
            return load.tok_s_prefill
        known = self._learned.get((node.name, model_id))
        if known is not None and known.prefill_tok_s is not None:
            return known.prefill_tok_s
        return _first_guess(node, model_id)

    def service_s(self, node: str, model_id: str) -> float:
        """Return how long a request holds its seat there."""
        known = self._learned.get((node, model_id))
        return SERVICE_S if known is None or known.service_s is None else known.service_s

    def load_s(self, node: NodeView, model_id: str, num_bytes: int | None) -> float:
        """Return how long a load takes; a model whose files the node lacks is fetched first."""
        known = self._learned.get((node.name, model_id))
        if known is not None and known.load_s is not None:
            return known.load_s
        size = num_bytes or ASSUMED_WEIGHT_BYTES
        load_s = LOAD_START_S + size / self._load_bytes_s.get(node.name, LOAD_BYTES_S)
        return load_s if model_id in node.models else load_s + size / DOWNLOAD_BYTES_S

    def load_bytes_s(self, node: str) -> float | None:
        """Return the measured rate of a node's loads, None before the first."""
        return self._load_bytes_s.get(node)

    def learn_load(self, node: str, model_id: str, num_bytes: int | None, load_s: float) -> None:
        """Take in how long a load took."""
        known = self._of(node, model_id)
        known.load_s = _mean(known.load_s, load_s, _WEIGHT_OF_NEW)
        if num_bytes and load_s > LOAD_START_S:
            rate = num_bytes / (load_s - LOAD_START_S)
            self._load_bytes_s[node] = _mean(self._load_bytes_s.get(node), rate, _WEIGHT_OF_NEW)

    def learn_prefill(
        self, node: str, model_id: str, num_tokens: int, first_token_s: float
    ) -> None:
        """Take in how long a prompt's uncached tokens took to the first token of the answer."""
        if num_tokens < MIN_PREFILL_SAMPLE_TOKENS or first_token_s <= 0:
            return
        known = self._of(node, model_id)
        rate = num_tokens / first_token_s
        slower = known.prefill_tok_s is not None and rate < known.prefill_tok_s
        weight = _WEIGHT_OF_SLOWER if slower else _WEIGHT_OF_NEW
        known.prefill_tok_s = _mean(known.prefill_tok_s, rate, weight)

    def learn_service(self, node: str, model_id: str, service_s: float) -> None:
        """Take in how long a request held its seat."""
        known = self._of(node, model_id)
        known.service_s = _mean(known.service_s, service_s, _WEIGHT_OF_NEW)

    def _of(self, node: str, model_id: str) -> _Learned:
        key = (node, model_id)
        known = self._learned.get(key)
        if known is None:
            known = self._learned[key] = _Learned()
            if len(self._learned) > self._max_learned:
                self._learned.popitem(last=False)
        self._learned.move_to_end(key)
        return known


def _mean(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)


def _first_guess(node: NodeView, model_id: str) -> float:
    info = node.models.get(model_id)
    weights = info.weight_bytes if info is not None else None
    gpu = node.devices[0] if node.devices else None
    if gpu is None:
        bandwidth, factor = _HOST, _PREFILL_PER_DECODE_HOST
    else:
        generation = gpu.compute_capability.partition(".")[0]
        by_generation = _BANDWIDTH_BY_GENERATION.get(generation, _UNKNOWN_GPU)
        named = (speed for piece, speed in _BANDWIDTH_BY_NAME if piece in gpu.name)
        bandwidth, factor = next(named, by_generation), _PREFILL_PER_DECODE_GPU
    return factor * bandwidth * _GB / (weights or ASSUMED_WEIGHT_BYTES)
