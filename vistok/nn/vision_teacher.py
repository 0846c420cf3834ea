"""Any vision transformer of timm as a frozen teacher: images -> one feature vector per patch."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.checkpoint import load_strictly, load_weights
from vistok.errors import UserError, first_line


class VisionTeacher(nn.Module):
    """A timm vision transformer with its own image size and normalisation inside.

    Its features are those of timm's ``forward_features``, patches only (DINOv2: behind the last norm).

    Args:
        model: of timm, without a classifier.

    Attributes:
        width: channels of a feature.
        grid: rows and columns of patches.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width: int = model.num_features
        self.grid: tuple[int, int] = model.patch_embed.grid_size
        for name in ("mean", "std"):
            value = torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w C"]:
        """One feature per patch of images in [-1, 1] of any size."""
        x = F.interpolate(images, self.model.patch_embed.img_size, mode="bicubic", antialias=True)
        features = self.model.forward_features(((x + 1) / 2 - self.mean) / self.std)
        return features[:, self.model.num_prefix_tokens :].unflatten(1, self.grid)


def load_teacher(name: str, weights: str | Path, **args: Any) -> VisionTeacher:
    """A timm vision transformer with the weights of a file; nothing is downloaded.

    Args:
        name: of timm, such as ``vit_large_patch14_dinov2.lvd142m``.
        weights: ``.safetensors`` or a torch file (read without running anything in it), in timm's layout or the
            authors' where timm converts it. Positions are resampled to the model's grid; a classifier is left out.
        args: arguments of ``timm.create_model``, such as ``img_size``.

    Raises:
        UserError: naming the unknown model, the argument that it does not take, the file that is missing or
            unreadable, or the keys that do not fit.
    """
    import timm  # slow to import

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"timm has no model {name!r}{'; did you mean ' + ', '.join(close) + '?' if close else ''}")
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are dropped: whoever uses it must not notice
            model: Any = timm.create_model(name, pretrained=False, **{**args, "num_classes": 0})
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"timm cannot make {name} with {args}: {first_line(error)}") from None
    if not (hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")):
        raise UserError(f"timm's {name} is no vision transformer with patch tokens")
    load_strictly(model, _converted(model, _read(Path(weights), name), weights), weights)
    return VisionTeacher(model)


def _read(path: Path, name: str) -> dict[str, Any]:
    """The content of a weights file."""
    if not path.is_file():
        raise UserError(f"teacher weights not found: {path} (supply those of timm's {name}, .safetensors or .pth)")
    if path.suffix == ".safetensors":
        return load_weights(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever its parsers do
        raise UserError(f"{path} is no complete torch file of plain weights") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, no state dict")
    return state


def _converted(model: Any, state: dict[str, Any], source: str | Path) -> dict[str, Tensor]:
    """``state`` in the layout of ``model``, without its classifier, by the filter of the model's family."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda state, model: state)
    try:
        state = convert(state, model)
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} holds no weights of {type(model).__name__}: {first_line(error)}") from None
    heads = model.pretrained_cfg["classifier"]  # one name or several
    heads = {heads} if isinstance(heads, str) else set(heads)
    return {key: value for key, value in state.items() if key.rsplit(".", 1)[0] not in heads}
