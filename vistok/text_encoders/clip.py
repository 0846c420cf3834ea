"""``clip``: the text tower of a pretrained CLIP (Radford et al. 2021).

The states are those of its last layer after the final norm, from the begin to the end token, as Stable Diffusion 1
reads them; what later models take from the layer before it is not. A whole CLIP will do. A state sees the words before
it only, so that the end token alone has read all of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from vistok.errors import UserError
from vistok.text_encoders.pretrained import PretrainedConfig, PretrainedTextEncoder, read, read_model


@dataclass
class Config(PretrainedConfig):
    """``path`` is a folder, or a repository of the hub such as ``openai/clip-vit-large-patch14``."""

    max_length: int = 77


class Clip(PretrainedTextEncoder):
    """See the module docstring; build it with :func:`build`."""

    def states(self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        # Whatever pads on the right: no state sees what comes after it.
        return self.model(input_ids=ids).last_hidden_state


def build(config: Config) -> Clip:
    """The text tower of the CLIP in ``config.path``.

    Raises:
        UserError: if there is none, a file or a tensor is missing, or ``max_length`` is more than it has positions for
            or leaves no room for a word.
    """
    tokenizer, model = read("clip", config.path, "AutoTokenizer"), read_model("clip", config.path, "CLIPTextModel")
    positions = model.config.max_position_embeddings
    if config.max_length > positions:
        raise UserError(f"clip: max_length is {config.max_length}, but {config.path} has {positions} positions")
    return Clip("clip", tokenizer, model, model.config.hidden_size, config)
