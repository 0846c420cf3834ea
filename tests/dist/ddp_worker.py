"""One rank of a training run that notes what it sees: ``ddp_worker.py CONFIG FOLDER key=value ...``."""

import sys
from pathlib import Path

import torch

from vistok.training.run import train
from vistok.training.run_config import load_config
from vistok.training.tasks import AdversarialTask, LossTask


class Noting:
    notes: dict = {"keys": [], "gradients": [], "before": []}  # noqa: RUF012

    def training_step(self, batch, batch_idx):
        self.notes["keys"].append(batch["key"])
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *args, **kwargs):
        self.notes["gradients"].append({name: p.grad.clone() for name, p in self.named_parameters()})
        self.notes["before"].append({name: p.detach().clone() for name, p in self.named_parameters()})
        super().configure_gradient_clipping(*args, **kwargs)

    def on_train_end(self):
        self.notes["weights"] = self.state_dict()
        self.notes["counters"] = (self.updates, self.images)
        torch.save(self.notes, folder / f"rank_{self.global_rank}.pt")


class NotingTask(Noting, LossTask):
    pass


class NotingAdversarialTask(Noting, AdversarialTask):
    pass


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    import vistok.training.run as run

    run.LossTask, run.AdversarialTask = NotingTask, NotingAdversarialTask
    train(load_config(sys.argv[1], sys.argv[3:]))
