"""A program of its own that imports torch and prints what it can do here, as JSON.

So the doctor stays light, and a torch that crashes or hangs is only a finding.
"""

import logging
import sys

import msgspec


class TorchDevice(msgspec.Struct, kw_only=True, frozen=True):
    """A GPU as torch sees it.

    Attributes:
        is_native: whether the native operators run on it.
    """

    index: int
    name: str
    is_native: bool


class TorchReport(msgspec.Struct, kw_only=True, frozen=True):
    """What torch can do.

    Attributes:
        cuda_version: which CUDA it is built for; None: none.
        cuda_error: why it cannot use a GPU although it is built for CUDA, "" if it can.
        is_native_loaded: whether the native operators load into it.
    """

    version: str
    cuda_version: str | None = None
    cuda_error: str = ""
    devices: list[TorchDevice] = []
    is_native_loaded: bool = False


def report() -> TorchReport:
    """Import torch and look."""
    import torch

    from cortex.neuron.kernels import extension

    error, devices = "", []
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            for index in range(torch.cuda.device_count()):
                device = torch.device("cuda", index)
                devices.append(
                    TorchDevice(
                        index=index,
                        name=torch.cuda.get_device_name(device),
                        is_native=extension.serves(device),
                    )
                )
        except (RuntimeError, AssertionError) as exc:
            error = (str(exc) or type(exc).__name__).splitlines()[0]
    return TorchReport(
        version=str(torch.__version__),
        cuda_version=torch.version.cuda,
        cuda_error=error,
        devices=devices,
        is_native_loaded=extension.is_loaded(),
    )


if __name__ == "__main__":
    # What is said of the operators comes out in the report.
    logging.disable(logging.WARNING)
    sys.stdout.buffer.write(msgspec.json.encode(report()) + b"\n")
