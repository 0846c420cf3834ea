"""Real images, each exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vistok.data.datamodule import Dataset, make_loader, ordered_batches


def image_batches(
    dataset: Dataset, batch_size: int, workers: int = 0, count: int | None = None
) -> Iterator[dict[str, Any]]:
    """Images of a data set in order, without augmentation, leaving out unreadable ones that it skips.

    Args:
        dataset: of images.
        batch_size: images at a time.
        workers: loader processes.
        count: take the first so many; None takes all.

    Yields:
        ``{"image": float32 (B, 3, H, W) in [-1, 1], "label": int64 (B,), "position": int64 (B,)}``; where nothing is
        skipped, the position is the image's index.
    """
    seen: set[str] = set()
    for batch in make_loader(dataset, ordered_batches(count or len(dataset), batch_size), workers):
        rows = []
        # The data set puts the next image in the place of one that it skips: that would count twice.
        for row, key in enumerate(batch["key"]):
            if key not in seen:
                seen.add(key)
                rows.append(row)
        if rows:
            yield {name: batch[name][rows] for name in ("image", "label", "position")}
