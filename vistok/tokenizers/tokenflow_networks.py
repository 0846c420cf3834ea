"""The semantic half of TokenFlow: a vision transformer before the quantizer, and a small one behind it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.nn.transformer import MLP, Block
from vistok.nn.vision_teacher import make_tower

if TYPE_CHECKING:
    from vistok.tokenizers.tokenflow import Config


class SemanticEncoder(nn.Module):
    """Images to semantic vectors: a vision transformer of timm that begins as its teacher, and a projection.

    Args:
        config: of the tokenizer.

    Attributes:
        width: channels of the transformer.
        grid: rows and columns of patches.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        args = {**config.encoder_args, "img_size": config.image_size}
        self.tower = make_tower(config.encoder, config.penultimate, config.normalize, **args)
        self.head = task_head(self.tower.width, config.semantic_dim)
        self.width, self.grid = self.tower.width, self.tower.grid

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Vectors before quantization, of images in [-1, 1]."""
        return self.head(self.tower(images)).permute(0, 3, 1, 2)


class SemanticDecoder(nn.Module):
    """Quantized semantic vectors to the teacher's features: the decoder of BEiT v2 (Peng et al. 2022, section 2.2).

    Args:
        config: of the tokenizer.
        grid: side of the map.
        outputs: channels of the teacher's features.
    """

    def __init__(self, config: Config, grid: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        width, norm = config.semantic_decoder_width, partial(nn.LayerNorm, eps=1e-6)
        self.embedding = nn.Linear(config.semantic_dim, width)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + grid**2, width))
        heads, depth = config.semantic_decoder_heads, config.semantic_decoder_depth
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, norm, mlp=MLP, bias=True) for _ in range(depth))
        self.norm = norm(width)
        self.head = task_head(width, outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of std 0.02, zero biases; what a block adds is smaller the later it comes."""
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.apply(_reset_linear)
        with torch.no_grad():
            for number, block in enumerate(cast(list[Block], self.blocks), start=1):
                for layer in (block.attention.out, cast(MLP, block.mlp).down):
                    layer.weight.div_((2 * number) ** 0.5)

    def tokens(self, codes: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        """Normalised patch tokens behind the blocks, of codes in raster order."""
        x = torch.cat([self.class_token.expand(len(codes), -1, -1), self.embedding(codes)], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])

    def forward(self, codes: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        """Features of codes in raster order."""
        return self.head(self.tokens(codes))


def task_head(width: int, outputs: int) -> nn.Sequential:
    """The projection at either side of the quantizer."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)).apply(_reset_linear)


def _reset_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
