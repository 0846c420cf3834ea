"""What one training step is: the task that turns batches into updates of a net, whatever the net is."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from vistok.errors import UserError
from vistok.interfaces import Autoencoder, ClassCondition, Condition, Generator, LossReport, TextEncoder, Tokenizer
from vistok.losses.adversarial import Discriminator, adaptive_weight, adversarial_loss, discriminator_loss
from vistok.losses.perceptual import PerceptualLoss
from vistok.nn.attention import training_attention
from vistok.nn.frozen import Frozen
from vistok.nn.precision import exact
from vistok.rng import derive_seed, seeded_generator
from vistok.tokens import Tokens
from vistok.training.optim import OptimConfig, decay_groups, lr_factor, make_optimizer
from vistok.training.sharding import ShardedStrategy, full, shard


class LossTask(L.LightningModule):
    """Trains a tokenizer or a generator on the loss that it reports, with one optimizer.

    ``updates`` and ``images`` (over all processes) are the only clocks: schedules, intervals, random streams and the
    order of the data follow them, and Lightning's own counters are not kept. So a run can be resumed on another
    number of processes, and a resumed run on the same number repeats an uninterrupted one bit for bit.

    Args:
        net: the model to train; the only registered child.
        optim: optimizer and schedule.
        max_updates: updates of the whole run.
        seed: seed of the run.
        tokenizer: frozen tokenizer that makes the tokens of a generator.
        tokenizer_hash: of its export; the checkpoint remembers it.
        text_encoder: frozen reader of the captions of a generator conditioned on text; None if the data have states.
        perceptual: judges what a tokenizer reconstructs, in training and in validation.
    """

    def __init__(
        self,
        net: Autoencoder | Generator,
        optim: OptimConfig,
        max_updates: int,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        tokenizer_hash: str | None = None,
        text_encoder: TextEncoder | None = None,
        perceptual: PerceptualLoss | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.tokenizer_hash = tokenizer_hash
        self.tokenizer = None if tokenizer is None else Frozen(tokenizer)
        self.text_encoder = None if text_encoder is None else Frozen(text_encoder)
        self.perceptual = perceptual
        self.optim, self.max_updates, self.seed = optim, max_updates, seed
        self.updates = self.images = 0
        self.updated = False  # whether the micro-batch that just ended completed an update
        self.report: LossReport  # detached, of the last micro-batch
        self.grad_norms: dict[str, Tensor]  # of the last update, before clipping
        self.lr: float  # of the last update
        self._seconds_before, self._started = 0.0, time.perf_counter()
        self.idle_since = 0.0  # when the last micro-batch and all callbacks were done (perf_counter)
        self._pending: list[dict[str, Tensor]] = []  # loss terms of the micro-batches of the next update

    @property
    def progress(self) -> dict[str, float]:
        """What the run has done and spent so far, all sessions together: for checkpoints and exports."""
        seconds = self._seconds_before + time.perf_counter() - self._started
        return {"updates": self.updates, "images": self.images, "seconds": round(seconds, 1)}

    def objective(self, batch: dict[str, Any], rng: torch.Generator) -> LossReport:
        """The net's loss of one batch, with the perceptual term if there is one."""
        if self.tokenizer is not None:
            return self.net(self.tokens(batch), self.condition(batch), rng)
        images = _images(batch)
        report = self.net(images, rng)
        if self.perceptual is None:
            return report
        return report.plus("perceptual", self.perceptual(_reconstruction(report, self.net), images))

    def training_objective(self, batch: dict[str, Any], rng: torch.Generator) -> LossReport:
        """:meth:`objective` and what counts in training alone."""
        return self.objective(batch, rng)

    def make_optimizer(self) -> AdamW:
        """The one optimizer, over everything that is trained."""
        return make_optimizer(self.net, self.optim)

    def clip_gradients(self) -> dict[str, Tensor]:
        """Clip, and return the norms before it by their names in the log."""
        return {"grad_norm": self._clipped(self.net)}

    def condition(self, batch: dict[str, Any]) -> Condition:
        """What a generator is conditioned on: the captions of a batch, cached or read now, its classes, or nothing."""
        if self.net.text_width:
            if "condition" in batch:
                return batch["condition"]
            assert self.text_encoder is not None
            return self.text_encoder.on(self.device).encode(batch["text"])
        classes = ClassCondition(batch["label"])
        return classes if self.net.num_classes else classes.null()

    def tokens(self, batch: dict[str, Any]) -> Tokens:
        """The tokens of a batch: cached ones, or what the tokenizer makes of its images or latents."""
        if "ids" in batch:
            return Tokens(batch["ids"], self.net.spec)
        assert self.tokenizer is not None
        with torch.no_grad(), exact(self.device):
            return self.tokenizer.on(self.device).tokenize(_images(batch))

    # ------------------------------------------------------------------ Lightning's hooks

    @override
    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.updated = False

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        stream = (self.seed, "train", self.updates, len(self._pending), self.global_rank)
        torch.manual_seed(derive_seed("layers", *stream))  # dropout layers know no other generator
        if isinstance(self.net, Generator):
            self.net.at_progress(self.updates / self.max_updates)
        with training_attention(self.device):
            report = self.training_objective(batch, seeded_generator(*stream, device=self.device))
        self.report = _detached(report)
        self._pending.append(self.report.terms | {"total": self.report.total})
        self.images += len(batch["label"]) * self.trainer.world_size
        return report.total

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with training_attention(self.device):  # what is computed once more must be computed alike
            super().backward(loss, *args, **kwargs)

    @override
    def on_train_batch_end(self, *_: object) -> None:
        self.idle_since = time.perf_counter()

    @override
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.grad_norms = self.clip_gradients()
        self._refuse_non_finite()

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        super().optimizer_step(*args, **kwargs)
        self.updates += 1
        self.updated = True
        self._pending.clear()
        if self.updates >= self.max_updates:
            self.trainer.should_stop = True

    @override
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            assert isinstance(self.net, Generator)
            shard(self.net, self.trainer.strategy.mesh)

    @override
    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer()
        scheduler = LambdaLR(optimizer, lambda update: lr_factor(update, self.optim, self.max_updates))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.progress, tokenizer_hash=self.tokenizer_hash)
        del checkpoint["loops"]  # Lightning's clocks, see above

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.updates, self.images = checkpoint["updates"], checkpoint["images"]
        self._seconds_before = checkpoint["seconds"]

    def _clipped(self, model: nn.Module) -> Tensor:
        limit = math.inf if self.optim.clip_norm is None else self.optim.clip_norm
        return full(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).detach())

    def _refuse_non_finite(self) -> None:
        """Stop before the optimizer moves anything; one transfer to the CPU for the whole update.

        Under fp16 an overflowing gradient is ordinary: the loss scaler skips that update.
        """
        named = [(f"loss term {name!r}", value) for terms in self._pending for name, value in terms.items()]
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            for name, norm in self.grad_norms.items():
                named.append((name.replace("grad_norm", "the gradient norm").replace("_", " of the "), norm))
        for (name, _), value in zip(named, torch.stack([value.float() for _, value in named]).tolist()):
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at update {self.updates + 1}: stopped before the weights changed, the last "
                    "checkpoint is sound (try a lower optim.lr, more optim.warmup_updates or trainer.precision=32-true)"
                )


class AdversarialTask(LossTask):
    """Trains a tokenizer and a discriminator of what it reconstructs against each other.

    Both learn from the same reconstruction in one backward pass: the adversarial term is blind to the discriminator's
    weights, and the discriminator's loss to the tokenizer's. So one optimizer can hold both, in groups of their own
    (AdamW treats every weight by itself), and accumulation, loss scaling, DDP and resuming are those of
    :class:`LossTask`. Gradients are clipped apart. Before ``start_update`` the discriminator neither runs nor moves.

    Args:
        discriminator: with its config; the second registered child.
        args, kwargs: of :class:`LossTask`.

    Raises:
        UserError: if the weight shall adapt and the tokenizer does not say where.
    """

    def __init__(self, discriminator: Discriminator, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.discriminator = discriminator
        if discriminator.config.adaptive and self.net.last_layer is None:
            raise UserError(f"adversarial.adaptive: {type(self.net).__name__} names no last layer to measure at")

    @property
    def is_playing(self) -> bool:
        """Whether the discriminator takes part in the current update."""
        return self.updates >= self.discriminator.config.start_update

    @override
    def training_objective(self, batch: dict[str, Any], rng: torch.Generator) -> LossReport:
        report = super().training_objective(batch, rng)
        reconstruction = _reconstruction(report, self.net)
        if not self.is_playing:
            return report
        config = self.discriminator.config
        loss = adversarial_loss(self.discriminator.frozen(reconstruction))
        weight: float | Tensor = config.weight
        if config.adaptive:
            assert isinstance(self.net, Autoencoder) and self.net.last_layer is not None
            weight = report.stats["adversarial_weight"] = weight * adaptive_weight(
                report.total, loss, self.net.last_layer
            )
        return report.plus("adversarial", weight * loss)

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        total = super().training_step(batch, batch_idx)
        if not self.is_playing:
            # DDP waits for a gradient of every weight; these are dropped.
            return total + 0 * sum(p.sum() for p in self.discriminator.parameters())
        real, fake = self.discriminator(_images(batch)), self.discriminator(self.report.reconstruction)
        loss = discriminator_loss(real, fake)
        self._pending[-1]["discriminator"] = loss.detach()
        # Not a term: the tokenizer's loss has nothing of it.
        stats = {"loss_discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        self.report.stats.update({name: value.detach() for name, value in stats.items()})
        return total + loss

    @override
    def clip_gradients(self) -> dict[str, Tensor]:
        norms = super().clip_gradients()
        if self.is_playing:
            return {**norms, "grad_norm_discriminator": self._clipped(self.discriminator)}
        self.discriminator.zero_grad()  # to None, which the optimizer passes over
        return norms

    @override
    def make_optimizer(self) -> AdamW:
        optimizer = super().make_optimizer()
        lr = self.discriminator.config.lr or self.optim.lr
        for group in decay_groups(self.discriminator, self.optim.weight_decay):
            optimizer.add_param_group({**group, "lr": lr})
        return optimizer


def _images(batch: dict[str, Any]) -> Tensor:
    """The images of a batch, or the latents that a cache has in their place."""
    return batch["latent"] if "latent" in batch else batch["image"]


def _reconstruction(report: LossReport, net: nn.Module) -> Tensor:
    if report.reconstruction is None:
        raise UserError(
            f"{type(net).__name__} reports no reconstruction for a perceptual or adversarial loss to judge: "
            "leave out perceptual and adversarial"
        )
    return report.reconstruction


def _detached(report: LossReport) -> LossReport:
    terms, stats = ({k: v.detach() for k, v in values.items()} for values in (report.terms, report.stats))
    images = None if report.reconstruction is None else report.reconstruction.detach()
    return dataclasses.replace(report, total=report.total.detach(), terms=terms, stats=stats, reconstruction=images)
