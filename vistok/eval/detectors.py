"""Who finds the objects of an image for GenEval: a procedural world that reads its own images, or a learned detector.

The original's Mask2Former of mmdet is not needed: any detector of ``transformers`` stands in for it, which is why every
result names its detector. Colours of learned detections are told by CLIP, as in the original: the crop of an object,
grey where its mask leaves it, is compared with three sentences for each of ten colours.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, masks_to_boxes

from vistok.data.datamodule import PromptedDataset
from vistok.errors import UserError
from vistok.eval.pretrained import from_folder, load_pretrained, summary_of, whole_hash
from vistok.geneval_rules import Box, Detection, Entry, Rules
from vistok.pictures import to_pil

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    # Some detectors keep the names of Pascal VOC.
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""Classes of COCO that GenEval calls otherwise than a detector does."""

_GREY = (0x99, 0x99, 0x99)


class Detector(Protocol):
    """Finds objects and names their colours.

    Attributes:
        rules: which of its detections count: scores of two detectors do not compare.
        identity: ``name`` and what else tells it from others, for the protocol.
    """

    rules: Rules
    identity: dict[str, str]

    def detect(self, image: UInt8[Tensor, "3 H W"], entry: Entry) -> list[Detection]:
        """The objects of an image, at least those of the classes that ``entry`` names."""

    def colors(self, image: UInt8[Tensor, "3 H W"], found: list[Detection]) -> list[str]:
        """The colours of objects of one class that were found in ``image``."""


class WorldDetector:
    """The detector that a data set brings for its own world; see :class:`Detector`.

    Args:
        world: the data set.
        thresholds: fields of :class:`~vistok.geneval_rules.Rules` instead of the world's own.
    """

    def __init__(self, world: PromptedDataset, thresholds: dict[str, float] | None = None) -> None:
        self.world, self.rules = world, replace(world.geneval_rules, **thresholds or {})  # type: ignore[arg-type]
        self.identity = {"name": f"analytic detector of {world.description['name']}"}

    def detect(self, image: UInt8[Tensor, "3 H W"], entry: Entry) -> list[Detection]:
        """All objects of the world in ``image``."""
        return self.world.detections(image.float() / 127.5 - 1)

    def colors(self, image: UInt8[Tensor, "3 H W"], found: list[Detection]) -> list[str]:
        """As detected."""
        return [detection.color for detection in found]


class LearnedDetector:
    """A detector of ``transformers`` and a CLIP for colours; see :class:`Detector`.

    Three families are told apart by their config: instance segmentation (Mask2Former), object detection with fixed
    classes (DETR, RT-DETR), and detection of whatever the prompt names (OWLv2, Grounding DINO).

    Args:
        source: folder of the detector, or a repository of the Hugging Face hub.
        color_model: the same of CLIP; the original's is OpenAI's ViT-L/14. None for prompts without colours.
        device: where to put both.
        thresholds: fields of :class:`~vistok.geneval_rules.Rules`. A detector without masks must be given
            ``min_score`` and ``min_counting_score``, since GenEval's were set for Mask2Former.

    Raises:
        UserError: if a folder or file is missing, is of another kind, lacks weights, or thresholds are needed.
    """

    def __init__(
        self,
        source: str,
        color_model: str | None,
        device: torch.device | str = "cpu",
        thresholds: dict[str, float] | None = None,
    ) -> None:
        import transformers  # slow to import

        self.device = device
        config = from_folder(transformers.AutoConfig, source, "--detector")
        families = (
            (transformers.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING, transformers.AutoProcessor, self._named),
            (transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING, transformers.AutoImageProcessor, self._boxes),
            (transformers.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, transformers.AutoImageProcessor, self._masks),
        )
        family = next((family for family in families if type(config) in family[0]), None)
        if family is None:
            raise UserError(f"--detector {source} holds {config.model_type}, which detects no objects")
        models, processors, find = family
        thresholds = thresholds or {}
        if find != self._masks and not {"min_score", "min_counting_score"} <= thresholds.keys():
            raise UserError(
                f"--detector {source} ({config.model_type}): give --min-score and --min-counting-score that suit it; "
                "GenEval's 0.3 and 0.9 are those of Mask2Former"
            )
        self.rules = Rules(**thresholds)  # type: ignore[arg-type]
        self.model = load_pretrained(models[type(config)], source, "--detector", device)
        self.processor = from_folder(processors, source, "--detector")
        self._find = find
        # Classes of COCO that the training images do not have are called N/A.
        self.names = {index: GENEVAL_NAMES.get(name, name) for index, name in self.model.config.id2label.items()}
        self.classes = None if find == self._named else set(self.names.values())
        self.identity = {"name": Path(source).name, "sha256": whole_hash(self.model, self.processor)}
        self.clip: ColorNamer | None = None
        if color_model is not None:
            self.clip = ColorNamer(color_model, device)
            color_hash = whole_hash(self.clip.model, self.clip.processor)
            self.identity |= {"color_model": Path(color_model).name, "color_sha256": color_hash}

    @torch.no_grad()
    def detect(self, image: UInt8[Tensor, "3 H W"], entry: Entry) -> list[Detection]:
        """All objects of a detector with fixed classes; those that ``entry`` names of another."""
        wanted = sorted({clause["class"] for clause in (*entry["include"], *entry.get("exclude", []))})
        return self._find(to_pil(image), wanted)

    def colors(self, image: UInt8[Tensor, "3 H W"], found: list[Detection]) -> list[str]:
        """What CLIP says; :meth:`check` tells beforehand whether there is one."""
        assert self.clip is not None
        return self.clip(to_pil(image), found)

    def check(self, entries: list[Entry]) -> None:
        """Raise UserError if a prompt asks for a class, or a colour, that this detector cannot tell."""
        clauses = [clause for entry in entries for clause in entry["include"]]
        asked = {clause["class"] for clause in clauses}
        if self.classes is not None and (unknown := sorted(asked - self.classes)):
            raise UserError(
                f"the detector {self.identity['name']} knows no {', '.join(map(repr, unknown[:5]))}: "
                "the prompts are about other classes than it was trained on"
            )
        colors = {clause["color"] for clause in clauses if "color" in clause}
        if colors and self.clip is None:
            raise UserError("the prompts ask for colours: give --color-model, a CLIP (openai/clip-vit-large-patch14)")
        if unknown := sorted(colors - set(COLORS)):
            raise UserError(f"the prompts ask for {unknown[0]!r}; the colours told apart are {', '.join(COLORS)}")

    @property
    def _least(self) -> float:
        return min(self.rules.min_score, self.rules.min_counting_score)

    def _masks(self, image: Image.Image, wanted: list[str]) -> list[Detection]:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        (result,) = self.processor.post_process_instance_segmentation(
            self.model(**inputs),
            threshold=self._least,
            target_sizes=[image.size[::-1]],
            return_binary_maps=True,  # else overlapping masks overwrite one another
        )
        segments = result["segments_info"]
        if not segments:
            return []
        masks = result["segmentation"].bool().cpu()
        # The first column and row behind the mask end its box.
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return [
            Detection(self.names[segment["label_id"]], segment["score"], _box(box), mask=mask.numpy())
            for segment, box, mask in zip(segments, boxes, masks, strict=True)
        ]

    def _boxes(self, image: Image.Image, wanted: list[str]) -> list[Detection]:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        (result,) = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=self._least, target_sizes=[image.size[::-1]]
        )
        labels = [self.names[index] for index in result["labels"].tolist()]
        return _detections(labels, result, image)

    def _named(self, image: Image.Image, wanted: list[str]) -> list[Detection]:
        inputs = self.processor(text=[wanted], images=image, return_tensors="pt").to(self.device)
        (result,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), threshold=self._least, target_sizes=[image.size[::-1]], text_labels=[wanted]
        )
        return [
            replace(found, name=name)
            for found in _detections(result["text_labels"], result, image)
            if (name := _class_of(found.name, wanted))
        ]


class ColorNamer:
    """CLIP as a classifier of the ten colours.

    Args:
        source: folder of a CLIP, or a repository of the Hugging Face hub.
        device: where to put it.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoProcessor, CLIPModel

        self.device = device
        self.model = load_pretrained(CLIPModel, source, "--color-model", device)
        self.processor = from_folder(AutoProcessor, source, "--color-model")
        self._classifiers: dict[str, Float[Tensor, "10 D"]] = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, found: list[Detection]) -> list[str]:
        """The likeliest colour of each object, all of one class."""
        crops = [crop(image, detection) for detection in found]
        inputs = self.processor(images=crops, return_tensors="pt").to(self.device)
        features = F.normalize(summary_of(self.model.get_image_features(**inputs)), dim=-1)
        return [COLORS[index] for index in (features @ self._classifier(found[0].name).T).argmax(dim=1).tolist()]

    def _classifier(self, name: str) -> Float[Tensor, "10 D"]:
        """The mean direction of the sentences about each colour."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            inputs = self.processor(text=texts, return_tensors="pt", padding=True).to(self.device)
            features = F.normalize(summary_of(self.model.get_text_features(**inputs)), dim=-1)
            means = features.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(dim=1)
            self._classifiers[name] = F.normalize(means, dim=-1)
        return self._classifiers[name]


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """The box of an object, grey outside its mask."""
    if detection.mask is not None:
        grey = Image.new("RGB", image.size, _GREY)
        image = Image.composite(image, grey, Image.fromarray(detection.mask))
    left, top, right, bottom = map(round, detection.box)
    # A box of no width is no image.
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def self_test(detector: LearnedDetector) -> str:
    """One line that says whether a detector finds what everybody sees in three photographs of scikit-image.

    A detector that was put together wrongly finds nothing, which would look like a bad generator.
    """
    from skimage import data

    scores = {}
    for name, photo in (("person", data.astronaut), ("cat", data.chelsea), ("cup", data.coffee)):
        image = torch.from_numpy(np.ascontiguousarray(photo())).permute(2, 0, 1)
        entry = {"include": [{"class": name, "count": 1}]}
        scores[name] = max((found.score for found in detector.detect(image, entry) if found.name == name), default=0.0)
    said = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
    if min(scores.values()) > detector.rules.min_score:
        return f"detector self-test on three photographs passed: {said}"
    return f"DETECTOR SELF-TEST FAILED: what three photographs show scores {said}, so that the scores mean nothing"


def _detections(labels: list[str], result: dict[str, Tensor], image: Image.Image) -> list[Detection]:
    boxes = clip_boxes_to_image(result["boxes"], image.size[::-1])
    rows = zip(labels, result["scores"].tolist(), boxes, strict=True)
    return [Detection(label, score, _box(box)) for label, score, box in rows]


def _class_of(phrase: str, wanted: list[str]) -> str:
    """The class that a phrase found in the list of classes stands for; empty if it could be several or none."""
    if phrase in wanted:
        return phrase
    words = set(re.findall(r"\w+", phrase))
    close = [name for name in wanted if words and words <= set(name.split())]
    return close[0] if len(close) == 1 else ""


def _box(box: Float[Tensor, " 4"]) -> Box:
    left, top, right, bottom = box.tolist()
    return left, top, right, bottom
