"""Compare methods on your own data: tensors of inputs and labels. The data here are made on the spot."""

import torch
from avalanche.models import SimpleMLP
from avalanche.training import EWC, Naive
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin

from avalanche_sp import AccuracyMatrix, OneHotMSELoss, SelectivePlasticityOptimizer, SelectivePlasticityPlugin
from avalanche_sp.data import TensorClassificationDataset, TensorSource, benchmark_of

CLASSES, INPUTS = 6, 40
centres = 0.5 * torch.randn(CLASSES, INPUTS)


def dataset(classes, count):
    y = torch.tensor(classes).repeat(count // len(classes))
    x = centres[y] + torch.randn(len(y), INPUTS)
    return TensorClassificationDataset.from_source(TensorSource(x, y))


tasks = [[0, 1], [2, 3], [4, 5]]
benchmark = benchmark_of([dataset(task, 2000) for task in tasks], [dataset(task, 400) for task in tasks])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def ours(parameters):
    return SelectivePlasticityOptimizer.for_continual_learning(parameters, with_gate=True)


methods = {
    "naive": (Naive, sgd, [], {}),
    "EWC": (EWC, sgd, [], {"ewc_lambda": 100}),
    "replay of 100 samples": (Naive, sgd, [ReplayPlugin(mem_size=100)], {}),
    "gate": (Naive, sgd, [SelectivePlasticityPlugin()], {}),
    "gate + optimizer": (Naive, ours, [SelectivePlasticityPlugin()], {}),
}
for name, (strategy_class, optimizer, plugins, arguments) in methods.items():
    torch.manual_seed(0)
    model = SimpleMLP(num_classes=CLASSES, input_size=INPUTS, hidden_size=64, drop_rate=0)
    matrix = AccuracyMatrix()
    strategy = strategy_class(
        model=model, optimizer=optimizer(model.parameters()), criterion=OneHotMSELoss(), train_mb_size=32,
        plugins=plugins, evaluator=EvaluationPlugin(matrix), **arguments,
    )  # fmt: skip
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    print(f"{name:22} ACC {matrix.result()[-1].mean():.1f}%")
