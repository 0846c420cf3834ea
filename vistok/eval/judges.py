"""Who answers questions about an image with yes or no: models of ``transformers``, from a folder or the hub.

DPG-Bench was published with mPLUG-large and GenAI-Bench with CLIP-FlanT5-XXL, neither of which ``transformers`` has;
T2I-CompBench with BLIP-VQA, which it has.
Scores of two judges do not compare, which is why every result names its judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vistok.errors import UserError
from vistok.eval.pretrained import from_folder, load_pretrained, whole_hash

INSTRUCTION = "Please answer yes or no."
"""What models that would rather chat are told after every question; GenAI-Bench's own words."""

PLAIN = ("blip-2", "instructblip", "paligemma")
"""Families that have no chat template; their processors put the image in front of the text."""


class Judge(Protocol):
    """Answers questions about an image.

    Attributes:
        identity: ``name`` and what else tells it from others, for the protocol.
    """

    identity: dict[str, str]

    def __call__(self, image: Image.Image, questions: Sequence[str]) -> Float[Tensor, " Q"]:
        """The probability that the answer to each question begins with yes."""


def load_judge(source: str, device: torch.device | str = "cpu") -> Judge:
    """The judge in a folder, or in a repository of the Hugging Face hub.

    Args:
        source: of a :class:`BlipVQA` or a :class:`VisionLanguageModel`, told apart by their config.
        device: where to put it.

    Raises:
        UserError: if a file is missing, a weight is missing, or the model answers no questions about images.
    """
    import transformers  # slow to import

    config = from_folder(transformers.AutoConfig, source, "--judge")
    if isinstance(config, transformers.BlipConfig):
        return BlipVQA(source, device)
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return VisionLanguageModel(source, device)
    raise UserError(
        f"--judge {source} holds {config.model_type}, which answers no questions about images "
        "(BLIP-VQA, BLIP-2, InstructBLIP, LLaVA, Qwen2.5-VL and their like do)"
    )


class BlipVQA:
    """BLIP (arXiv 2201.12086) for question answering; see :class:`Judge`.

    Args:
        source: a folder of ``transformers`` or a repository of the Hugging Face hub.
        device: where it runs.

    Raises:
        UserError: if the files are missing or are no BLIP for question answering.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import BlipForQuestionAnswering, BlipProcessor

        self.model = load_pretrained(BlipForQuestionAnswering, source, "--judge", device)
        self.processor = from_folder(BlipProcessor, source, "--judge")
        self._yes = _tokens_of(self.processor.tokenizer, source, "yes")
        digest = whole_hash(self.model, self.processor)
        self.identity = {"name": Path(source).name, "sha256": digest, "asked": "{question}"}

    @torch.no_grad()
    def __call__(self, image: Image.Image, questions: Sequence[str]) -> Float[Tensor, " Q"]:
        """See :class:`Judge`."""
        model, processor = self.model, self.processor
        pixels = processor.image_processor(image, return_tensors="pt").pixel_values.to(model.device, model.dtype)
        seen = model.vision_model(pixels)[0]
        begin = torch.full((1, 1), model.decoder_start_token_id, device=model.device)
        answers = []
        # One at a time: the answer to a padded question would depend on its padding.
        for question in questions:
            words = processor.tokenizer(question, return_tensors="pt").input_ids.to(model.device)
            asked = model.text_encoder(words, encoder_hidden_states=seen)[0]
            logits = model.text_decoder(begin, encoder_hidden_states=asked).logits[0, -1]
            answers.append(logits.float().softmax(dim=-1)[self._yes].sum())
        return torch.stack(answers).cpu()


class VisionLanguageModel:
    """A language model that sees, asked for the first token of its answer; see :class:`Judge`.

    Every question is followed by :data:`INSTRUCTION`; "yes" and "Yes" count alike.

    Args:
        source: a folder of ``transformers`` or a repository of the Hugging Face hub, with a chat template unless it is
            one of :data:`PLAIN`.
        device: where it runs.

    Raises:
        UserError: if the files are missing, or cannot ask a question or spell its answer.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = load_pretrained(AutoModelForImageTextToText, source, "--judge", device)
        self.processor = from_folder(AutoProcessor, source, "--judge")
        family = self.model.config.model_type
        self._chats = family not in PLAIN
        if self._chats and not getattr(self.processor, "chat_template", None):
            raise UserError(f"--judge {source}: a {family} is asked through its chat template, which is missing")
        self._yes = _tokens_of(self.processor.tokenizer, source, "yes", "Yes")
        asked: str = self._chat("{question}", tokenize=False) if self._chats else self._plain("{question}")
        digest = whole_hash(self.model, self.processor)
        self.identity = {"name": Path(source).name, "sha256": digest, "asked": asked}

    @torch.no_grad()
    def __call__(self, image: Image.Image, questions: Sequence[str]) -> Float[Tensor, " Q"]:
        """See :class:`Judge`."""
        return torch.stack([self._answer(image, question) for question in questions]).cpu()

    def _answer(self, image: Image.Image, question: str) -> Float[Tensor, ""]:
        if self._chats:
            inputs = self._chat(question, image=image, tokenize=True, return_dict=True, return_tensors="pt")
        else:
            inputs = self.processor(images=image, text=self._plain(question), return_tensors="pt")
        answer = self.model.generate(
            **inputs.to(self.model.device, self.model.dtype),
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        probabilities: Tensor = answer.logits[0][0].float().softmax(dim=-1)
        return probabilities[self._yes].sum()

    def _chat(self, question: str, image: Image.Image | None = None, **options: Any) -> Any:
        picture = {"type": "image"} if image is None else {"type": "image", "image": image}
        content = [picture, {"type": "text", "text": f"{question} {INSTRUCTION}"}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, **options)

    @staticmethod
    def _plain(question: str) -> str:
        return f"Question: {question} {INSTRUCTION} Answer:"


def _tokens_of(tokenizer: Any, source: str, *words: str) -> list[int]:
    """The tokens of those spellings of a word that are one token each."""
    spellings = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    tokens = {ids[0] for ids in spellings if len(ids) == 1} - {tokenizer.unk_token_id}
    if not tokens:
        raise UserError(f"--judge {source}: its tokenizer has no token for {words[0]!r}")
    return sorted(tokens)
