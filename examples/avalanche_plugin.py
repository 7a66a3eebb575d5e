"""Add the gate to an Avalanche script: one plugin, and its metrics. Run it in the root of a checkout."""

import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import InteractiveLogger
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin

from avalanche_sp import SelectivePlasticityPlugin, selective_plasticity_metrics, split_mnist

benchmark = split_mnist(5, dataset_root="benchmarks/data/mnist")  # or any other of Avalanche's benchmarks
model = SimpleMLP(num_classes=10, hidden_size=256, drop_rate=0)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    criterion=torch.nn.CrossEntropyLoss(),
    train_mb_size=64,
    plugins=[SelectivePlasticityPlugin()],
    evaluator=EvaluationPlugin(
        accuracy_metrics(stream=True), *selective_plasticity_metrics(), loggers=[InteractiveLogger()]
    ),
)
for experience in benchmark.train_stream:
    strategy.train(experience)
    metrics = strategy.eval(benchmark.test_stream)
print(f"ACC {metrics['ACC_Percent/eval_phase/test_stream']:.1f}%")
