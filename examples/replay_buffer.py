"""The gate with a replay buffer of 200 samples. Run it in the root of a checkout."""

import torch
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import ReplayPlugin

from avalanche_sp import JointReplayLoss, OneHotMSELoss, SelectivePlasticityPlugin, split_mnist

benchmark = split_mnist(5, dataset_root="benchmarks/data/mnist")
model = SimpleMLP(num_classes=10, hidden_size=256, drop_rate=0)
strategy = Naive(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
    criterion=JointReplayLoss(OneHotMSELoss()),  # weighs stored samples as the data that they stand for
    train_mb_size=64,
    # GaussianBuffer().replay_plugin() instead of ReplayPlugin replays samples drawn from Gaussians, and stores none.
    plugins=[ReplayPlugin(mem_size=200), SelectivePlasticityPlugin()],
)
for experience in benchmark.train_stream:
    strategy.train(experience, drop_last=True)
metrics = strategy.eval(benchmark.test_stream)
print(f"accuracy {100 * metrics['Top1_Acc_Stream/eval_phase/test_stream/Task000']:.1f}%")
