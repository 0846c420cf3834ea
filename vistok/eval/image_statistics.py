"""What one pass over a set of images leaves behind for all generation metrics."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vistok.eval.features import FeatureNetwork
from vistok.eval.fid import Gaussian, Moments
from vistok.eval.inception_score import InceptionScore, ordered_parts, shuffled_parts
from vistok.eval.processes import of_all, rows_of_all
from vistok.rng import seeded_generator


class ImageStatistics:
    """Sums of features of a set of images, and the features of some of them.

    Memory does not grow with the number of images, but for the features, of which at most ``most_kept`` are kept.
    Each of several processes adds its share; what comes out is of all of them, in order.

    Args:
        network: the feature network.
        total: how many images will come; fewer may.
        most_kept: features of so many images are kept, drawn at random where there are more.
        seed: names the draw.
        device: where images and sums live; the kept features are on the CPU.
    """

    def __init__(
        self, network: FeatureNetwork, total: int, most_kept: int, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.network, self.device = network, device
        widths = {"pool": network.num_features, "spatial": network.num_spatial}
        self.moments = {layer: Moments(width).to(device) for layer, width in widths.items() if width}
        self.parts = {"shuffled": shuffled_parts(total), "ordered": ordered_parts(total)}
        self.scores = {
            cut: InceptionScore(network.num_logits, int(parts.max()) + 1).to(device)
            for cut, parts in self.parts.items()
            if network.num_logits
        }
        self.kept_rows = draw(total, min(most_kept, total), seed)
        self._kept = torch.empty(len(self.kept_rows), network.num_features)
        self._num_kept = 0
        self._counts = torch.zeros(3, dtype=torch.int64)

    @torch.no_grad()
    def update(self, images: UInt8[Tensor, "B 3 H W"], labels: Int[Tensor, " B"], rows: Int[Tensor, " B"]) -> None:
        """Add images; labels are -1 where there is no class, rows are ascending places among all images."""
        layers = self.network.layers(images.to(self.device))
        for layer, moments in self.moments.items():
            moments.update(layers[layer])
        for cut, score in self.scores.items():
            score.update(layers["logits"], self.parts[cut][rows])
        kept = layers["pool"][torch.isin(rows, self.kept_rows).to(self.device)]
        self._kept[self._num_kept : self._num_kept + len(kept)] = kept.cpu()
        self._num_kept += len(kept)
        right = self.network.count_right(layers["pool"], labels)
        self._counts += torch.tensor([len(images), int((labels >= 0).sum()), right])

    @property
    def kept(self) -> Float[Tensor, "M F"]:
        """Pool features of the images of ``kept_rows``, in order."""
        return rows_of_all(self._kept[: self._num_kept])

    @property
    def count(self) -> int:
        """How many images there were."""
        return self._totals()[0]

    def gaussians(self) -> dict[str, Gaussian]:
        """The Gaussian of each layer, ``pool`` and ``spatial``."""
        return {layer: moments.compute() for layer, moments in self.moments.items()}

    def inception_scores(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of the Inception score ``shuffled`` and ``ordered``; empty without logits."""
        return {cut: tuple(score.compute().tolist()) for cut, score in self.scores.items()}

    def class_accuracy(self) -> float | None:
        """Share of images that the network takes for their class; None unless each has one and it knows classes."""
        count, labelled, right = self._totals()
        return right / count if "class" in self.network.heads and labelled == count else None

    def _totals(self) -> list[int]:
        return torch.stack(of_all(self._counts)).sum(0).tolist()


def draw(total: int, count: int, seed: int) -> Int[Tensor, " count"]:
    """``count`` of ``total`` indices without replacement, in order."""
    return torch.randperm(total, generator=seeded_generator("features", seed))[:count].sort().values
