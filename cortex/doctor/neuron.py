"""What a neuron needs of its host; imports the libraries of one."""

from functools import partial
from pathlib import Path

from cortex.core.config import NeuronConfig, user_cache_dir
from cortex.doctor.findings import LIMIT_S, Check, Finding
from cortex.doctor.gpu import (
    TORCH_S,
    count_cards,
    judge_driver,
    judge_operators,
    judge_torch,
    look_for_torch,
)
from cortex.doctor.host import check_cache, check_hub, check_sockets, check_state_dir
from cortex.doctor.ports import port_check
from cortex.neuron.discovery import NvmlProbe
from cortex.neuron.kernels.build import describe_build

_DISK = "a file system does not answer: see `df`, and mounts of network file systems"
_DRIVER = "the NVIDIA driver does not answer: see `dmesg`, and reboot this host"


def neuron_checks(config: NeuronConfig, *, is_sure: bool) -> list[Check]:
    """Return the checks of a neuron.

    Args:
        is_sure: whether this host is to be one, so that a missing torch is a failure.
    """
    torch = config.harness.torch
    state = Path(config.state_dir or user_cache_dir())
    needs_torch = is_sure and "torch" in config.kinds
    return [
        port_check("neuron", config.host, config.port, frozenset(["neuron", "up"])),
        Check(
            name="driver",
            look=lambda: judge_driver(NvmlProbe().hardware(), count_cards()),
            limit_s=LIMIT_S,
            if_it_hangs=_DRIVER,
        ),
        Check(
            name="torch",
            look=partial(_look_at_torch, is_needed=needs_torch),
            # The probe ends by itself before that.
            limit_s=TORCH_S + LIMIT_S,
            if_it_hangs=_DRIVER,
        ),
        Check(
            name="state",
            look=lambda: [check_state_dir(state)],
            limit_s=LIMIT_S,
            if_it_hangs=_DISK,
        ),
        Check(name="cache", look=lambda: check_cache(torch), limit_s=LIMIT_S, if_it_hangs=_DISK),
        Check(
            name="sockets",
            look=lambda: [check_sockets()],
            limit_s=LIMIT_S,
            if_it_hangs=_DISK,
        ),
        Check(
            name="hub",
            look=lambda: [check_hub(torch)],
            limit_s=LIMIT_S,
            if_it_hangs="see /etc/resolv.conf, or set HF_HUB_OFFLINE=1",
        ),
    ]


def _look_at_torch(*, is_needed: bool) -> list[Finding]:
    hardware = NvmlProbe().hardware()
    torch = look_for_torch()
    return [
        *judge_torch(torch, hardware, is_needed=is_needed),
        *judge_operators(describe_build(), torch),
    ]
