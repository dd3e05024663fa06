"""What an attention layer does differently under `vca.intervene`: the changed equations, one method each."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STREAMS = ("positive", "negative")
STAGES = ("stage1", "stage2")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of an attention layer. Every method returns its tensor itself, not a copy, where nothing is changed.

    Attributes:
        lambdas: the lambda of each stage; None for the learned one.
        scales: what the lambda of each stage is multiplied with.
        muted: heads whose last map is zero.
        off: streams whose maps are zero, and stages whose scores are zero; of `STREAMS` and `STAGES`.
    """

    lambdas: tuple[float | None, float | None] = (None, None)
    scales: tuple[float, float] = (1.0, 1.0)
    muted: frozenset[int] = frozenset()
    off: frozenset[str] = frozenset()

    def then(self, other: "Change") -> "Change":
        """This change, and then the other: a lambda that the other sets is its own, all else adds up."""
        pairs = list(zip(self.lambdas, self.scales, other.lambdas, other.scales, strict=True))
        lambdas = [value if new is None else new for value, _, new, _ in pairs]
        scales = [scale * more if new is None else more for _, scale, new, more in pairs]
        return Change(
            lambdas=(lambdas[0], lambdas[1]),
            scales=(scales[0], scales[1]),
            muted=self.muted | other.muted,
            off=self.off | other.off,
        )

    def parts(self) -> Iterator[str]:
        """What is changed beside muted heads: "lambda1", "lambda2", streams and stages."""
        for stage, (value, scale) in enumerate(zip(self.lambdas, self.scales, strict=True), start=1):
            if value is not None or scale != 1:
                yield f"lambda{stage}"
        yield from sorted(self.off)

    @property
    def needs_maps(self) -> bool:
        """Whether the layer must take the path that materializes its maps."""
        return not self.off.isdisjoint(STREAMS)

    def contrast_lambda(self, stage: int, lam: Tensor | None) -> Tensor | None:
        """The lambda of a stage, 1 or 2, from the learned one; None for a stage without."""
        if lam is None:
            return None
        value, scale = self.lambdas[stage - 1], self.scales[stage - 1]
        lam = lam if value is None else torch.full_like(lam, value)
        return lam if scale == 1 else lam * scale

    def scored(self, stage: int, x: Tensor) -> Tensor:
        """The keys or queries that the scores of a stage are products with: zero if the stage is off."""
        return torch.zeros_like(x) if f"stage{stage}" in self.off else x

    def streams(self, maps: Tensor, dim: int) -> Tensor:
        """Both maps A+-, or the positive one alone, one after the other along `dim`: zero where the stream is off."""
        off = [index for index, name in enumerate(STREAMS[: maps.shape[dim]]) if name in self.off]
        return _zeroed(maps, dim, off)

    def heads(self, x: Tensor) -> Tensor:
        """The last maps or the outputs of all heads, (B, H, ...): zero where the head is muted."""
        return _zeroed(x, 1, sorted(self.muted))


def _zeroed(x: Tensor, dim: int, indices: list[int]) -> Tensor:
    return x.index_fill(dim, torch.tensor(indices, device=x.device), 0) if indices else x


UNCHANGED = Change()
