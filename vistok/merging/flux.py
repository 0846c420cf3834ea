"""Follow the Flow (arXiv 2504.01137) for Flux: edited states of its T5, given to a stock pipeline.

    pipe(**edited_states(pipe, ["a pool by a table"], isolate=[["table"]]), generator=...)

The summary of CLIP, which Flux reads as well, is that of the whole prompt, as in the published code: an image made from
a few words still has a hint of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.errors import UserError
from vistok.merging.entities import align_item, find_tokens, find_words
from vistok.merging.semantic_binding import patch, swap_item


@torch.no_grad()
def edited_states(
    pipe: Any,
    prompts: Sequence[str],
    keep: Sequence[Sequence[str | int]] | None = None,
    isolate: Sequence[Sequence[str]] | None = None,
    max_sequence_length: int = 512,
) -> dict[str, Tensor]:
    """Text inputs of a ``FluxPipeline``.

    Args:
        pipe: the pipeline.
        prompts: texts.
        keep: for each prompt, the words or positions whose states are kept; all others become those of the empty
            prompt. By default all are kept.
        isolate: for each prompt, the words that get the states that they have alone, so that they say nothing of
            each other.
        max_sequence_length: tokens of T5, padding included: 256 for schnell, 512 for dev.

    Returns:
        ``prompt_embeds`` ``(B, N, C)`` and ``pooled_prompt_embeds`` ``(B, D)``.

    Raises:
        UserError: if the pipeline is another one, words are not in their prompt or are spelled otherwise alone, or
            positions lie outside.
    """
    tokenizer = getattr(pipe, "tokenizer_2", None)
    if tokenizer is None or not hasattr(pipe, "encode_prompt") or not hasattr(pipe, "transformer"):
        raise UserError(f"edited_states: needs a pipeline of Flux, got {type(pipe).__name__}")
    for name, rows in {"keep": keep, "isolate": isolate}.items():
        if rows is not None and len(rows) != len(prompts):
            raise UserError(f"edited_states: {len(rows)} rows of {name} for {len(prompts)} prompts")

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        return pipe.encode_prompt(prompt=texts, prompt_2=None, max_sequence_length=max_sequence_length)[:2]

    states, pooled = encode(list(prompts))
    if isolate is not None:
        items = list(dict.fromkeys(item for row in isolate for item in row))
        alone = dict(zip(items, encode(items)[0])) if items else {}
        for index, (prompt, row) in enumerate(zip(prompts, isolate)):
            for item in row:
                states[index] = swap_item(states[index], alone[item], *align_item(tokenizer, prompt, item))
    if keep is not None:
        empty = encode([""])[0]
        for index, (prompt, wanted) in enumerate(zip(prompts, keep)):
            kept = [position for what in wanted for position in _positions(tokenizer, prompt, what)]
            states[index] = patch(states[[index]], empty, kept)[0]
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


def _positions(tokenizer: Any, prompt: str, what: str | int) -> tuple[int, ...]:
    return (what,) if isinstance(what, int) else find_tokens(tokenizer, prompt, find_words(prompt, what))
