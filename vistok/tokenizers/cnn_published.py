"""How releases name the tensors of the convolutional autoencoder, see :mod:`vistok.nn.cnn`."""

from __future__ import annotations

from dataclasses import dataclass

from vistok.key_maps import KeyRule, layer_rules


@dataclass(frozen=True)
class Layout:
    """Published names of the parts.

    Args:
        down: prefix of the encoder's levels.
        up: prefix of the decoder's levels.
        up_from_image: the decoder's level 0 is the one next to the images, not the deepest.
        res: the residual blocks of a level.
        middle: its two residual blocks, with the attention between them.
        qkv: projections to queries, keys and values, or all three in one.
    """

    down: str
    up: str
    up_from_image: bool
    res: str
    middle: tuple[str, str, str]
    qkv: tuple[str, ...]

    def encoder_rules(self, ours: str, theirs: str, levels: int) -> list[KeyRule]:
        """Rules of a :class:`~vistok.nn.cnn.CNNEncoder` of ``levels`` levels, called ``ours`` here."""
        rules = self._outer_rules(ours, theirs)
        for level in range(levels):
            rules += self._level_rules(f"{ours}.levels.{level}", f"{theirs}.{self.down}.{level}", "downsample")
        return rules

    def decoder_rules(self, ours: str, theirs: str, levels: int) -> list[KeyRule]:
        """Rules of a :class:`~vistok.nn.cnn.CNNDecoder` of ``levels`` levels, called ``ours`` here."""
        rules = self._outer_rules(ours, theirs)
        for level in range(levels):
            number = levels - 1 - level if self.up_from_image else level
            rules += self._level_rules(f"{ours}.levels.{level}", f"{theirs}.{self.up}.{number}", "upsample")
        return rules

    def _outer_rules(self, ours: str, theirs: str) -> list[KeyRule]:
        first, attention, second = (f"{theirs}.{name}" for name in self.middle)
        return [
            *layer_rules(ours, theirs, {name: name for name in ("conv_in", "norm_out", "conv_out")}),
            *residual_rules(f"{ours}.middle.0", first),
            *self._attention_rules(f"{ours}.middle.1", attention),
            *residual_rules(f"{ours}.middle.2", second),
        ]

    def _level_rules(self, ours: str, theirs: str, resample: str) -> list[KeyRule]:
        return [
            *residual_rules(f"{ours}.res.{{i}}", f"{theirs}.{self.res}.{{i}}"),
            *self._attention_rules(f"{ours}.attention.{{i}}", f"{theirs}.attn.{{i}}"),
            *layer_rules(f"{ours}.resample", f"{theirs}.{resample}.conv"),
        ]

    def _attention_rules(self, ours: str, theirs: str) -> list[KeyRule]:
        return [
            *layer_rules(f"{ours}.norm", f"{theirs}.norm"),
            *(
                KeyRule(f"{ours}.qkv.{part}", tuple(f"{theirs}.{name}.{part}" for name in self.qkv))
                for part in ("weight", "bias")
            ),
            *layer_rules(f"{ours}.out", f"{theirs}.proj_out"),
        ]


def residual_rules(ours: str, theirs: str, shortcut: str = "shortcut") -> list[KeyRule]:
    """Rules of a residual block whose shortcut is called ``shortcut`` here."""
    same = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    return layer_rules(ours, theirs, {**same, shortcut: "nin_shortcut"})


LLAMAGEN = Layout(
    down="conv_blocks",
    up="conv_blocks",
    up_from_image=False,
    res="res",
    middle=("mid.0", "mid.1", "mid.2"),
    qkv=("q", "k", "v"),
)
"""LlamaGen's tokenizers, and the pixel branch of TokenFlow."""

VAR = Layout(
    down="down",
    up="up",
    up_from_image=True,
    res="block",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    qkv=("qkv",),
)
"""VAR's tokenizer."""
