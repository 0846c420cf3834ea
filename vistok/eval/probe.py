"""How much a tokenizer understands: a linear classifier on its features (linear probe).

The features of an image are pooled over its positions (mean, or all of them side by side), each channel is brought to
zero mean and unit variance on the training images, and scikit-learn's logistic regression is fitted to these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vistok.errors import UserError
from vistok.eval.processes import rows_of_all
from vistok.interfaces import Autoencoder

Pool = Literal["mean", "flatten"]

DEFINITIONS = {
    "top1": "scikit-learn LogisticRegression (lbfgs, C=1, at most 1000 iterations) on standardised pooled features",
}


@torch.no_grad()
def pooled_features(
    model: Autoencoder,
    batches: Iterable[dict[str, Any]],
    pool: Pool,
    options: dict[str, Any],
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[Float[Tensor, "N F"], Int[Tensor, " N"]]:
    """Features and classes of images that have one; those of all processes, on each of them.

    Args:
        model: in evaluation mode.
        batches: of :func:`vistok.eval.images.image_batches`; of several processes, each one's share, at least one.
        pool: ``mean`` over positions, or all of them.
        options: of the model's ``features``.
        device: of the model.
        progress: called with the number of images read since the last call.

    Raises:
        UserError: if the images have no classes, or the model no features.
    """
    features, labels = [], []
    for batch in batches:
        if int(batch["label"].min()) < 0:
            raise UserError("a probe needs images with classes, and some here have none")
        found = model.features(batch["image"].to(device), **options).float().cpu()
        features.append(found.mean(dim=1) if pool == "mean" else found.flatten(1))
        labels.append(batch["label"])
        if progress:
            progress(len(found))
    return rows_of_all(torch.cat(features)), rows_of_all(torch.cat(labels))


def linear_probe(
    train: tuple[Float[Tensor, "N F"], Int[Tensor, " N"]], held_out: tuple[Float[Tensor, "M F"], Int[Tensor, " M"]]
) -> dict[str, float]:
    """Share of images whose class is found: ``top1`` of held-out ones, ``top1_train`` of those it was fitted to.

    Raises:
        UserError: if the training images are all of one class.
    """
    if len(train[1].unique()) < 2:
        raise UserError("a probe needs images of at least two classes")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    (x, y), (x_held_out, y_held_out) = (tuple(part.numpy() for part in split) for split in (train, held_out))
    classifier.fit(x, y)
    return {"top1": classifier.score(x_held_out, y_held_out), "top1_train": classifier.score(x, y)}
