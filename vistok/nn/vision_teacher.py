"""Any vision transformer of timm, frozen as a teacher or trained: images -> one feature vector per patch."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError, first_line
from vistok.files import load_weights
from vistok.key_maps import is_repository, load_strictly, load_torch_file, published_file

SIZES = {"embed_dim", "depth", "num_heads", "patch_size"}
"""Arguments of ``timm.create_model`` with which no released weights fit."""


class VisionTower(nn.Module):
    """A timm vision transformer: images of its own size -> one feature vector per patch.

    Its features are those of timm's ``forward_features``, patches only (DINOv2, CLIP: behind the last norm).

    Args:
        model: of timm.
        normalize: by the model's own mean and standard deviation; False takes images as they are.

    Attributes:
        width: channels of a feature.
        grid: rows and columns of patches.
        patch_size: side of a patch, px.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, normalize: bool = True) -> None:
        super().__init__()
        self.model = model
        self.normalize = normalize
        self.width: int = model.num_features
        self.grid: tuple[int, int] = model.patch_embed.grid_size
        self.patch_size: int = model.patch_embed.patch_size[0]
        for name in ("mean", "std"):
            value = torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def pixels(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] as the model was trained on them."""
        return ((images + 1) / 2 - self.mean) / self.std if self.normalize else images

    def images(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Inverse of :meth:`pixels`."""
        return (pixels * self.std + self.mean) * 2 - 1 if self.normalize else pixels

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w C"]:
        """One feature per patch of images in [-1, 1]."""
        features = self.model.forward_features(self.pixels(images))
        return features[:, self.model.num_prefix_tokens :].unflatten(1, self.grid)

    def with_layers(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B N C"], list[Float[Tensor, "B N C"]]]:
        """The features in raster order, and what every block makes of the patches."""
        features, layers = self.model.forward_intermediates(self.pixels(images), output_fmt="NLC")
        return features[:, self.model.num_prefix_tokens :], layers


class VisionTeacher(VisionTower):
    """A tower for images of any size; where its model has a classifier, the features are what that makes of each patch.

    Args:
        model: of timm.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.width = model.num_classes or model.num_features

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w C"]:
        """One feature per patch of images in [-1, 1] of any size."""
        x = F.interpolate(images, self.model.patch_embed.img_size, mode="bicubic", antialias=True)
        return self.model.head(super().forward(x))


def make_tower(name: str, penultimate: bool = False, normalize: bool = True, **args: Any) -> VisionTower:
    """A timm vision transformer with fresh weights and nothing that its features do not need.

    Args:
        name: of timm, such as ``vit_base_patch16_clip_quickgelu_224``.
        penultimate: features are the output of the last block but one, without the norm behind the blocks.
        normalize: see :class:`VisionTower`.
        args: arguments of ``timm.create_model``, such as ``img_size``.

    Raises:
        UserError: naming the unknown model, or the argument that it does not take.
    """
    model = _make(name, {**args, "num_classes": 0})
    _prune(model, penultimate)
    return VisionTower(model, normalize)


def load_teacher(
    name: str, weights: str | Path, outputs: int = 0, penultimate: bool = False, **args: Any
) -> VisionTeacher:
    """A timm vision transformer with the weights of a file; nothing is downloaded unless a repository is named.

    Args:
        name: of timm, such as ``vit_large_patch14_dinov2.lvd142m``.
        weights: ``.safetensors`` or a torch file (read without running anything in it), in timm's layout or the
            authors' where timm converts it; or a repository of the Hugging Face hub such as
            ``timm/vit_large_patch14_dinov2.lvd142m``. Positions are resampled to the model's grid; a classifier is
            left out.
        outputs: of the model's classifier, which then stays and is applied to every patch (CLIP: the projection to the
            space that it shares with texts); 0 leaves it out.
        penultimate: see :func:`make_tower`.
        args: arguments of ``timm.create_model``, such as ``img_size``.

    Raises:
        UserError: naming the unknown model, the argument that it does not take, the file that is missing or
            unreadable, or the keys that do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # its first weights are dropped: whoever uses it must not notice
        model = load_model(name, weights, num_classes=outputs, **args)
    if penultimate:
        _prune(model, penultimate)
    return VisionTeacher(model)


def load_model(name: str, weights: str | Path | None = None, **args: Any) -> Any:
    """A timm vision transformer as timm makes it, classifier included.

    Args:
        name: of timm.
        weights: see :func:`load_teacher`; None for fresh ones.
        args: arguments of ``timm.create_model``.

    Raises:
        UserError: see :func:`load_teacher`.
    """
    model = _make(name, args)
    if weights is not None:
        load_strictly(model, _converted(model, _read(weights, name, args), weights), weights)
    return model


def _make(name: str, args: dict[str, Any]) -> Any:
    """A timm model that is a vision transformer with patch tokens."""
    import timm  # slow to import

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"timm has no model {name!r}{'; did you mean ' + ', '.join(close) + '?' if close else ''}")
    try:
        model: Any = timm.create_model(name, pretrained=False, **args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"timm cannot make {name} with {args}: {first_line(error)}") from None
    if not (hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")):
        raise UserError(f"timm's {name} is no vision transformer with patch tokens")
    return model


def _prune(model: Any, penultimate: bool) -> None:
    """Take away what the features do not need."""
    model.prune_intermediate_layers([-2 if penultimate else -1], prune_norm=penultimate)


def _read(source: str | Path, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The content of a weights file, or of that of a repository of the hub; ``args`` are those of the model."""
    path = Path(source)
    if not path.is_file():
        if not is_repository(path):
            supply = (
                f"supply those of timm's {name}, .safetensors or .pth, or a "
                f"repository of the Hugging Face hub that has them, such as timm/{name}"
            )
            if SIZES & args.keys():
                supply = f"of a {name} with sizes of its own: the header of the run's config says how to make them"
            raise UserError(f"teacher weights not found: {path} ({supply})")
        path = published_file(str(source), name, "model.safetensors")
    if path.suffix == ".safetensors":
        return load_weights(path)
    state = load_torch_file(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, no state dict")
    return state


def _converted(model: Any, state: dict[str, Any], source: str | Path) -> dict[str, Tensor]:
    """``state`` in the layout of ``model``, without a classifier that it lacks, by the filter of its family."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
    try:
        state = convert(state, model)
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} holds no weights of {type(model).__name__}: {first_line(error)}") from None
    if model.num_classes:
        return state
    heads = model.pretrained_cfg["classifier"]  # one name or several
    heads = {heads} if isinstance(heads, str) else set(heads)
    return {key: value for key, value in state.items() if key.rsplit(".", 1)[0] not in heads}
