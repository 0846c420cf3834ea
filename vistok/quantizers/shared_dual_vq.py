"""Two codebooks with one index (Qu et al., "TokenFlow", 2024, arXiv 2412.03069, section 3.1).

A semantic and a pixel vector of the same position choose one row number together, and each takes that row of its own
table.
"""

from __future__ import annotations

from vistok.quantizers.vq import Codebook, CodebookOptions


class SharedDualCodebook(Codebook):
    """The row that minimises ``semantic distance² + pixel_weight · pixel distance²``.

    Vectors and codes are the two branches side by side, semantic first: ``(..., semantic_dim + pixel_dim)``. The
    tables are ``tables[0]`` and ``tables[1]``.

    Args:
        vocab_size: rows of each table.
        semantic_dim: channels of the semantic table.
        pixel_dim: channels of the pixel table.
        pixel_weight: of the pixel distance (the paper's w_dis); 0 lets the semantic branch choose alone.
        options: see :class:`~vistok.quantizers.vq.CodebookOptions`.

    Raises:
        UserError: as :class:`~vistok.quantizers.vq.Codebook`.
    """

    def __init__(
        self,
        vocab_size: int,
        semantic_dim: int = 32,
        pixel_dim: int = 8,
        pixel_weight: float = 1.0,
        options: CodebookOptions | None = None,
    ) -> None:
        widths = (semantic_dim, pixel_dim)
        super().__init__(vocab_size, sum(widths), options, widths=widths, weights=(1.0, pixel_weight))
