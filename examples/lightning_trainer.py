"""The gate in Lightning's Trainer: a small MLP learns two groups of Gaussian classes, one after the other.

    pip install 'avalanche-sp[lightning]'
    python examples/lightning_trainer.py
"""

import logging
import tempfile
import warnings

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_sp.integrations.lightning import SelectivePlasticityCallback

INPUTS, CLASSES = 30, 4


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def samples(classes, count, seed):
    """Samples around each class's center."""
    centers = 0.5 * torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(0))
    y = torch.tensor(classes).repeat(count // len(classes))
    return TensorDataset(centers[y] + torch.randn(len(y), INPUTS, generator=torch.Generator().manual_seed(seed)), y)


def run(gated):
    """Accuracy on the first and the second group of classes after both were trained, one after the other."""
    torch.manual_seed(0)
    module = Classifier()
    callbacks = [SelectivePlasticityCallback(F.cross_entropy)] if gated else []
    with tempfile.TemporaryDirectory() as folder:
        for group in ((0, 1), (2, 3)):
            trainer = lightning.Trainer(
                max_epochs=2, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(module, DataLoader(samples(group, 2000, seed=1 + group[0]), batch_size=32, shuffle=True))
    module.eval()
    tests = [samples(group, 1000, seed=9 + group[0]).tensors for group in ((0, 1), (2, 3))]
    with torch.no_grad():
        return [100 * float((module(x).argmax(1) == y).float().mean()) for x, y in tests]


def main():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for gated in (False, True):
        old, new = run(gated)
        print(f"{'with' if gated else 'without'} the gate: first classes {old:.1f}%, new classes {new:.1f}%")


if __name__ == "__main__":
    main()
