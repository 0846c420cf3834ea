"""A discriminator of patches and the losses of the game between it and a tokenizer.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017 (arXiv 1611.07004), section
3.2.2, is PatchGAN; Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021 (arXiv
2012.09841), section 3.1, is the game. The defaults are those of LlamaGen and TokenFlow, which start it after 20,000
updates with a fixed weight of 0.5; VQGAN and latent diffusion adapt the weight.

Ours: the discriminator's loss is never weighted (LlamaGen and TokenFlow halve it, which Adam does not notice).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError


@dataclass
class AdversarialConfig:
    """The discriminator, and how much it counts. ``optim`` holds for it too, but for its learning rate.

    Args:
        weight: factor on the adversarial term of the tokenizer's loss.
        start_update: updates made before the game begins.
        adaptive: multiply the weight by :func:`adaptive_weight`.
        width: channels of the first layer.
        layers: convolutions that halve the side; 3 judge patches of 70 px.
        lr: peak learning rate of the discriminator; null takes that of the tokenizer.

    Raises:
        UserError: if a number is outside its range.
    """

    weight: float = 0.5
    start_update: int = 20000
    adaptive: bool = False
    width: int = 64
    layers: int = 3
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f"adversarial.weight must be positive (adversarial=null trains without), got {self.weight}")
        if self.start_update < 0:
            raise UserError(f"adversarial.start_update must be at least 0, got {self.start_update}")
        for name in ("width", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"adversarial.{name} must be at least 1, got {getattr(self, name)}")
        if self.lr is not None and self.lr <= 0:
            raise UserError(f"adversarial.lr must be positive (null takes optim.lr), got {self.lr}")


class Discriminator(nn.Sequential):
    """PatchGAN: one logit for each overlapping patch, positive where it looks real.

    Convolutions 4 x 4 with leaky ReLUs and batch normalisation, weights from N(0, 0.02), as released with VQGAN. The
    normalisation always uses the batch of its own process: what it remembers is never asked for.

    Args:
        config: sizes; kept for who trains it.
        image_size: side of the images, px.

    Raises:
        UserError: if the images are too small for so many layers.
    """

    def __init__(self, config: AdversarialConfig, image_size: int) -> None:
        # Two convolutions of stride 1 shorten the side by 1 each.
        if image_size >> config.layers < 3:
            raise UserError(
                f"adversarial.layers={config.layers} needs images of at least {3 << config.layers} px, these have "
                f"{image_size}: take fewer layers"
            )
        widths = [config.width * min(2**level, 8) for level in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, len(widths)):
            stride = 2 if level < config.layers else 1
            layers.append(nn.Conv2d(widths[level - 1], widths[level], 4, stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(widths[level]), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.config = config
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def frozen(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """Logits with gradients for the images and none for the weights."""
        self.requires_grad_(False)
        try:
            return self(images)
        finally:
            self.requires_grad_(True)


def adversarial_loss(fake: Float[Tensor, "B 1 h w"]) -> Float[Tensor, ""]:
    """What the tokenizer minimises: the negative mean logit of its reconstructions, float32."""
    return -fake.float().mean()


def discriminator_loss(real: Float[Tensor, "B 1 h w"], fake: Float[Tensor, "B 1 h w"]) -> Float[Tensor, ""]:
    """Hinge loss, float32: half the mean of max(0, 1 - real) and of max(0, 1 + fake) together."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""], adversarial_loss: Float[Tensor, ""], last_layer: Tensor
) -> Float[Tensor, ""]:
    """Ratio of the gradient norms of two losses at the decoder's last layer (VQGAN, equation 7), detached.

    Args:
        reconstruction_loss: any loss: terms that the last layer does not enter into do not count.
        adversarial_loss: of the same reconstructions.
        last_layer: its weight.

    Returns:
        A factor of at most 10,000, as released.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)
