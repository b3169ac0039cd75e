"""Root-mean-square norms; computed in float32, returned in the input's dtype."""

from torch import Tensor
from torch.nn import functional


class RmsNorm:
    """x / rms(x) * w over the last dimension.

    Args:
        weight: float32, broadcast over x from the right: (size,) or (heads, size). Families that
            store w - 1 pass 1 + stored.
        eps: added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return x normalised, same shape and dtype."""
        normed = functional.rms_norm(x.float(), x.shape[-1:], None, self._eps)
        return (normed * self._weight).to(x.dtype)
