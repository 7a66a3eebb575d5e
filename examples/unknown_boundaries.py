"""A stream that does not say where a task ends: the plugin finds the boundaries. Run it in the root of a checkout.

    pip install 'avalanche-sp[detection]'
"""

import torch
from avalanche.benchmarks.scenarios import split_online_stream
from avalanche.models import SimpleMLP
from avalanche.training import Naive

from avalanche_sp import OneHotMSELoss, SelectivePlasticityPlugin, split_mnist

benchmark = split_mnist(5, dataset_root="benchmarks/data/mnist")
model = SimpleMLP(num_classes=10, hidden_size=256, drop_rate=0)
plugin = SelectivePlasticityPlugin(consolidate="surprise")
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    criterion=OneHotMSELoss(),
    train_mb_size=64,
    plugins=[plugin],
    evaluator=None,
)
for experience in split_online_stream(benchmark.train_stream, experience_size=64):  # each a mini-batch
    strategy.train(experience)
print("boundaries found after the iterations", plugin.consolidated_at)
with torch.no_grad():
    tests = [e.dataset.read_batch(list(range(len(e.dataset))))[:2] for e in benchmark.test_stream]
    print([f"{100 * (model(x).argmax(1) == y).float().mean():.1f}%" for x, y in tests])
