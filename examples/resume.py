"""Resume a stopped run between two experiences: give the same command again. Run it in the root of a checkout.

mid_experience_checkpoint.py also resumes in the middle of an experience.
"""

import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import SimpleMLP
from avalanche.training import Naive

from avalanche_sp import OneHotMSELoss, SelectivePlasticityPlugin, split_mnist

benchmark = split_mnist(5, dataset_root="benchmarks/data/mnist")
model = SimpleMLP(num_classes=10, hidden_size=256, drop_rate=0)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    criterion=OneHotMSELoss(),
    train_mb_size=64,
    plugins=[SelectivePlasticityPlugin()],
)
strategy, first = maybe_load_checkpoint(strategy, "run.pkl")  # the strategy as it is, and 0, if there is no file
print(f"{first} experiences were trained before")
for experience in benchmark.train_stream[first:]:
    strategy.train(experience)
    strategy.eval(benchmark.test_stream)
    save_checkpoint(strategy, "run.pkl")
