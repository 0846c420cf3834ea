"""The released TokenBridge generators: their key layout, and how their files are read.

``tokenbridge_large`` and ``tokenbridge_huge`` of ``Epiphqny/TokenBridge``: a ``checkpoint-last.pth`` with ``model``
(the whole state dict) and ``model_ema`` (averages of the parameters, without buffers). Sizes are read from the tensors.
Not in the file, but part of the model: the order in which the head predicts the channels of the KL-16 latents.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vistok.errors import UserError
from vistok.generators import masked
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.masked import Config, Masked
from vistok.key_maps import TIMM_BLOCK, KeyMap, KeyRule, layer_rules, load_strictly, load_torch_file, published_file
from vistok.quantizers.dimensionwise import KL16_ORDER, gaussian_cells
from vistok.tokens import Grid2D, TokenSpec

FILE = "checkpoint-last.pth"
HEADS = {768: 12, 1024: 16, 1280: 16}
"""Attention heads of the released widths: no tensor tells them."""
STRIDE_PX = 16
"""Pixels of the KL-16 autoencoder's cell."""
CONSTANTS = ("reconstruction_values", "boundaries", "channel_mask")
"""Buffers of the released files that every model makes of itself."""


def _rows(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The equal parts of the first dimension in another order."""
    return lambda x: torch.cat([x.chunk(len(order))[part] for part in order])


def _columns(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda x: x[:, list(order)]


def _table_rule(ours: str, theirs: str, axes: int = 1) -> KeyRule:
    """``[1, ...]`` <-> ``[...]``."""
    return KeyRule(ours, (theirs,), lambda x: x.squeeze(0) if axes == 1 else x[0, 0], lambda x: x[(None,) * axes])


_SLOTS = len(KL16_ORDER)

BACKBONE_RULES = [
    KeyRule("condition.table.weight", ("class_emb.weight", "fake_latent"), last_rows=1),
    _table_rule("encoder_positions", "encoder_pos_embed_learned"),
    _table_rule("decoder_positions", "decoder_pos_embed_learned"),
    _table_rule("output_positions", "output_pos_embed"),
    _table_rule("mask_token", "mask_token", axes=2),
    KeyRule(
        "adapter.embedding.weight",
        ("z_proj.weight",),
        _columns(KL16_ORDER),
        _columns(tuple(KL16_ORDER.index(channel) for channel in range(_SLOTS))),
    ),
    KeyRule("adapter.embedding.bias", ("z_proj.bias",)),
    *layer_rules("input_norm", "z_proj_ln"),
    *layer_rules("encoder.{i}", "encoder_blocks.{i}", TIMM_BLOCK),
    *layer_rules("encoder_norm", "encoder_norm"),
    *layer_rules("decoder_in", "decoder_embed"),
    *layer_rules("decoder.{i}", "decoder_blocks.{i}", TIMM_BLOCK),
    *layer_rules("decoder_norm", "decoder_norm"),
]
"""Everything but the head; MAR's are the same, but for the name of the output positions."""

# Theirs: shift, scale, gate of the attention, then of the MLP. Ours: both gates first.
_MODULATION, _MODULATION_BACK = (2, 5, 0, 1, 3, 4), (2, 3, 0, 4, 5, 1)

HEAD_RULES = [
    *layer_rules("adapter.condition", "condition_proj"),
    _table_rule("adapter.slots", "channel_embed"),
    _table_rule("adapter.steps", "timesteps_embeddings"),
    KeyRule("adapter.codes.weight", tuple(f"token_embeddings.{slot}.weight" for slot in range(_SLOTS - 1))),
    *layer_rules("adapter.blocks.{i}", "channel_blocks.{i}", TIMM_BLOCK),
    *layer_rules("adapter.blocks.{i}.attention.q_norm", "channel_blocks.{i}.attn.q_norm"),
    *layer_rules("adapter.blocks.{i}.attention.k_norm", "channel_blocks.{i}.attn.k_norm"),
    *(
        KeyRule(
            f"adapter.blocks.{{i}}.modulation.linear.{part}",
            (f"channel_blocks.{{i}}.adaLN_modulation.1.{part}",),
            _rows(_MODULATION),
            _rows(_MODULATION_BACK),
        )
        for part in ("weight", "bias")
    ),
    *layer_rules("adapter.norm", "channel_norm"),
    *layer_rules("adapter.modulation.linear", "channel_final.adaLN_modulation.1"),
    *(
        KeyRule(f"adapter.head.{part}", tuple(f"channel_heads.{slot}.{part}" for slot in range(_SLOTS)))
        for part in ("weight", "bias")
    ),
]

PUBLISHED_KEYS = KeyMap("published TokenBridge", [*BACKBONE_RULES, *HEAD_RULES])
"""The parameters of the released files, without their :data:`CONSTANTS`."""


def load_published(path_or_hub_id: str) -> Masked:
    """See :meth:`Masked.from_published`."""
    file = published_file(path_or_hub_id, "TokenBridge", FILE)
    state = _read(file)
    levels = state.get("reconstruction_values")
    if levels is None:
        raise UserError(f"{file}: reconstruction_values is missing")
    if not torch.allclose(levels.double(), gaussian_cells(len(levels))[1], atol=1e-5):
        raise UserError(f"{file}: its reconstruction_values are not the published table of {len(levels)} levels")
    return from_state({key: value.float() for key, value in state.items() if key not in CONSTANTS}, str(file))


def from_state(state: dict[str, Tensor], source: str) -> Masked:
    """The model of a published state dict without its :data:`CONSTANTS`."""
    ours = PUBLISHED_KEYS.to_ours(state)
    config, spec = _sizes(ours, source)
    model = masked.build(config, spec)
    load_strictly(model, ours, source)
    return model.eval()


def _read(file: Path) -> dict[str, Tensor]:
    """The state dict of a released file, its parameters averaged."""
    saved = load_torch_file(file)
    if not (isinstance(saved, dict) and isinstance(saved.get("model"), dict) and saved.get("model_ema")):
        raise UserError(f"{file} is no TokenBridge checkpoint: it needs the entries model and model_ema")
    state = saved["model"] | saved["model_ema"]
    if any(key.startswith("diffloss.") for key in state):
        raise UserError(f"{file} holds a MAR model, whose diffusion head predicts latents: TokenBridge predicts codes")
    return state


def _sizes(ours: dict[str, Tensor], source: str) -> tuple[Config, TokenSpec]:
    """Config and tokens of a state dict in our layout.

    Raises:
        UserError: if a tensor that tells a size is missing, or the width is none of the released ones.
    """
    try:
        positions, width = ours["output_positions"].shape
        slots, inner = ours["adapter.slots"].shape
        levels = len(ours["adapter.head.bias"]) // slots
        side, head_dim = round(positions**0.5), len(ours["adapter.blocks.0.attention.q_norm.weight"])
        buffer = len(ours["encoder_positions"]) - positions
        num_classes = len(ours["condition.table.weight"]) - 1
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]} is missing in our layout") from None
    if width not in HEADS:
        raise UserError(f"{source}: width {width} is none of the released ones ({', '.join(map(str, HEADS))})")
    head = HeadConfig(inner, _depth(ours, "adapter.blocks."), inner // head_dim, step_in_first_input=True)
    config = Config(width, _depth(ours, "encoder."), HEADS[width], buffer, head, num_classes=num_classes)
    return config, TokenSpec(Grid2D(side, side), (levels,) * slots, slots, STRIDE_PX * side)


def _depth(ours: dict[str, Tensor], blocks: str) -> int:
    numbers = [key.removeprefix(blocks).split(".")[0] for key in ours if key.startswith(blocks)]
    return 1 + max(map(int, numbers))
