"""The native operators: whether they are built, for which devices, and their fake forms.

Loading registers `torch.ops.cortex.*`. Where the library is missing or does not load, the plain
torch operators of `gdn_torch` serve and one warning says how to build it.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cortex.neuron.kernels.build import describe_build

_log = logging.getLogger(__name__)

_LIBRARY = Path(__file__).with_name("_C.abi3.so")
_HOW_TO_BUILD = (
    "build them with `pip install --no-build-isolation .` in a source checkout, beside the torch "
    "that serves (it takes a C++ compiler, and nvcc for CUDA)"
)


@functools.cache
def is_loaded() -> bool:
    """Load the library on the first call; return whether its operators are registered."""
    if not _LIBRARY.exists():
        _log.warning(
            "the native operators are not built and plain torch serves, several times slower: %s",
            _HOW_TO_BUILD,
        )
        return False
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as exc:
        _log.warning(
            "the native operators do not load (%s) and plain torch serves, several times slower: "
            "%s",
            exc,
            _HOW_TO_BUILD,
        )
        return False
    _register_fakes()
    return True


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether the native operators run on a device."""
    if not is_loaded():
        return False
    if device.type != "cuda":
        return device.type == "cpu"
    build = describe_build()
    archs = build.cuda_archs if build is not None else ()
    major, minor = torch.cuda.get_device_capability(device)
    if runs_on(archs, major, minor):
        return True
    _log.warning(
        "the native operators are built for %s, not for sm_%d%d, and plain torch serves, several "
        "times slower: %s",
        ", ".join(f"sm_{arch}" for arch in archs) or "CPUs alone",
        major,
        minor,
        _HOW_TO_BUILD,
    )
    return False


def runs_on(archs: tuple[str, ...], major: int, minor: int) -> bool:
    """Whether code for some archs ("80", "90a") runs on a card of a compute capability.

    Machine code runs on cards of its generation that are at least as new, that of an "a" arch on
    its own card alone. The newest arch, if it is no "a" arch, is there as PTX too, which every
    later card translates.
    """
    card = 10 * major + minor
    for arch in archs:
        number = int(arch.rstrip("af"))
        if number == card or (arch.isdigit() and number // 10 == major and number < card):
            return True
    return bool(archs) and archs[-1].isdigit() and int(archs[-1]) < card


def _register_fakes() -> None:
    """Tell torch the shapes and dtypes of the results, for torch.compile and fake tensors."""

    def like_v(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> Tensor:
        return v.new_empty(v.shape)

    def like_first(x: Tensor, *_: Tensor | float | None) -> Tensor:
        return x.new_empty(x.shape)

    def gates(b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        return b.new_empty(b.shape, dtype=torch.float32), b.new_empty(b.shape, dtype=torch.float32)

    def like_z(mixed: Tensor, z: Tensor, *_: Tensor | float) -> Tensor:
        return mixed.new_empty(z.shape)

    def prefilled(
        qkv: Tensor, g: Tensor, beta: Tensor, states: Tensor, *_: Tensor | None
    ) -> Tensor:
        return qkv.new_empty((qkv.shape[0], *states.shape[1:3]))

    fakes: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
        "gated_delta_rule_recurrence": like_v,
        "chunked_gated_delta_rule_recurrence": like_v,
        "causal_conv1d_update": like_first,
        "causal_conv1d_full": like_first,
        "fused_gdn_gating": gates,
        "gdn_gated_norm": like_first,
        "gdn_decode_step": like_z,
        "gdn_prefill": prefilled,
        "gdn_verify": like_z,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"cortex::{name}", fake)
