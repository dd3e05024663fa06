"""The maps of one stage of an attention layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StageMaps:
    """The maps of one stage. Rows are queries, columns keys; streams an attention kind lacks are None."""

    positive: Tensor
    negative: Tensor | None = None
    differential: Tensor | None = None

    @property
    def applied(self) -> Tensor:
        """The map that multiplies the values: the differential one, or the positive one of a single stream."""
        return self.positive if self.differential is None else self.differential
