"""Token embedding."""

from torch import Tensor
from torch.nn import functional


class Embedding:
    """A table of token vectors, (vocab_size, hidden_size)."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return (rows, hidden_size) for (rows,) int64."""
        return functional.embedding(token_ids, self.table)
