"""What one training step is: the task that turns batches into updates of a net, whatever the net is."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from vistok.errors import UserError
from vistok.interfaces import Autoencoder, ClassCondition, Condition, Generator, LossReport, TextEncoder, Tokenizer
from vistok.nn.frozen import Frozen
from vistok.rng import derive_seed, seeded_generator
from vistok.tokens import Tokens
from vistok.training.optim import OptimConfig, lr_factor, make_optimizer


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
        text_encoder: frozen reader of the captions of a generator conditioned on text.
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
    ) -> None:
        super().__init__()
        self.net = net
        self.tokenizer_hash = tokenizer_hash
        self.tokenizer = None if tokenizer is None else Frozen(tokenizer)
        self.text_encoder = None if text_encoder is None else Frozen(text_encoder)
        self.optim, self.max_updates, self.seed = optim, max_updates, seed
        self.updates = self.images = 0
        self.updated = False  # whether the micro-batch that just ended completed an update
        self.report: LossReport  # detached, of the last micro-batch
        self.grad_norm: Tensor  # of the last update, before clipping
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
        """The net's loss of one batch."""
        if self.tokenizer is None:
            return self.net(_images(batch), rng)
        return self.net(self.tokens(batch), self.condition(batch), rng)

    def condition(self, batch: dict[str, Any]) -> Condition:
        """What a generator is conditioned on: the captions of a batch, its classes, or nothing."""
        if self.text_encoder is not None:
            return self.text_encoder.on(self.device).encode(batch["text"])
        classes = ClassCondition(batch["label"])
        return classes if self.net.num_classes else classes.null()

    def tokens(self, batch: dict[str, Any]) -> Tokens:
        """The tokens of a batch: cached ones, or what the tokenizer makes of its images or latents."""
        if "ids" in batch:
            return Tokens(batch["ids"], self.net.spec)
        assert self.tokenizer is not None
        with torch.no_grad(), self.tokenizer.exact(self.device):
            return self.tokenizer.on(self.device).tokenize(_images(batch))

    # ------------------------------------------------------------------ Lightning's hooks

    @override
    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.updated = False

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        stream = (self.seed, "train", self.updates, len(self._pending), self.global_rank)
        torch.manual_seed(derive_seed("layers", *stream))  # dropout layers know no other generator
        report = self.objective(batch, seeded_generator(*stream, device=self.device))
        self.report = _detached(report)
        self._pending.append(self.report.terms | {"total": self.report.total})
        self.images += len(batch["label"]) * self.trainer.world_size
        return report.total

    @override
    def on_train_batch_end(self, *_: object) -> None:
        self.idle_since = time.perf_counter()

    @override
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        limit = math.inf if self.optim.clip_norm is None else self.optim.clip_norm
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), limit).detach()
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
    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = make_optimizer(self.net, self.optim)
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

    def _refuse_non_finite(self) -> None:
        """Stop before the optimizer moves anything; one transfer to the CPU for the whole update.

        Under fp16 an overflowing gradient is ordinary: the loss scaler skips that update.
        """
        named = [(f"loss term {name!r}", value) for terms in self._pending for name, value in terms.items()]
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            named.append(("the gradient norm", self.grad_norm))
        for (name, _), value in zip(named, torch.stack([value.float() for _, value in named]).tolist()):
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at update {self.updates + 1}: stopped before the weights changed, the last "
                    "checkpoint is sound (try a lower optim.lr, more optim.warmup_updates or trainer.precision=32-true)"
                )


def _images(batch: dict[str, Any]) -> Tensor:
    """The images of a batch, or the latents that a cache has in their place."""
    return batch["latent"] if "latent" in batch else batch["image"]


def _detached(report: LossReport) -> LossReport:
    terms, stats = ({k: v.detach() for k, v in values.items()} for values in (report.terms, report.stats))
    return dataclasses.replace(report, total=report.total.detach(), terms=terms, stats=stats)
