"""A run that may be stopped at any moment, also in the middle of an experience, and goes on bit for bit.

    python examples/mid_experience_checkpoint.py --checkpoint run.pkl

trains both gates with replay on five-task Split MNIST and saves all of it every 100 iterations. Stopped, by kill -9
too, the same command goes on from the last save and ends with the weights and metrics of a run that was never stopped.
`Resumable` is what another script needs of this one; docs/checkpoints.md says what it does.
"""

import argparse
import itertools
import os
from pathlib import Path

import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.determinism.rng_manager import RNGManager
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin

from avalanche_sp import (
    JointReplayLoss,
    MetricsCSVLogger,
    OneHotMSELoss,
    SelectivePlasticityOptimizer,
    SelectivePlasticityPlugin,
    selective_plasticity_metrics,
    split_mnist,
)
from avalanche_sp.data import benchmark_of

MNIST = Path(__file__).resolve().parents[1] / "benchmarks" / "data" / "mnist"


class Resumable:
    """Mixin before an Avalanche strategy: saves every ``every`` iterations of an epoch, and goes on from there.

    Before each batch is fetched all random generators get a seed of their own, the epoch's plus the batch's number.
    So the batches do not depend on the random numbers of training (dropout), and to find its place in an epoch
    again a run only fetches the first batches once more. Give ``train`` one experience at a time.

    Args:
        checkpoint: the file. It is replaced whole: a save that is cut short leaves the one before.
        every: iterations from one save to the next.
    """

    _epoch_seed = None  # only within an epoch

    def __init__(self, *, checkpoint, every=100, **kwargs):
        super().__init__(**kwargs)
        self.checkpoint, self.every = Path(checkpoint), every

    def save(self):
        part = self.checkpoint.with_name(self.checkpoint.name + ".part")
        save_checkpoint(self, part, exclude=["mbatch", "mb_output", "loss"])  # of the last iteration: not needed
        os.replace(part, self.checkpoint)

    def train(self, experience, eval_streams=None, **kwargs):
        if self._epoch_seed is None:
            return super().train(experience, eval_streams, **kwargs)
        saved, given = self.experience.current_experience, experience.current_experience
        if given != saved:
            raise ValueError(f"Invalid experience: {given} (allowed: {saved}, the one that was being trained on)")
        self._train_exp(self.experience, **kwargs)
        self._after_training_exp(**kwargs)
        self._after_training(**kwargs)
        self._train_cleanup()
        return self.evaluator.get_last_metrics()

    def _train_exp(self, experience, eval_streams=None, **kwargs):
        # Avalanche's, but for an epoch that has begun already and those that have ended.
        while self.clock.train_exp_epochs < self.train_epochs:
            if self._epoch_seed is None:
                self._before_training_epoch(**kwargs)
                if self._stop_training:
                    self._stop_training = False
                    break
            self.training_epoch(**kwargs)
            self._after_training_epoch(**kwargs)

    def training_epoch(self, **kwargs):
        if self._epoch_seed is None:
            self._epoch_seed = int(torch.randint(2**31, ()))
        self.dataloader = self._batches(self.dataloader)
        try:
            super().training_epoch(**kwargs)
        finally:
            self._epoch_seed = None

    def _batches(self, loader):
        """The loader's batches from the present place in the epoch on."""
        self.dataloader = loader  # which plugins look at; the loop holds this generator
        batches, done = iter(loader), self.clock.train_epoch_iterations
        for number in itertools.count():
            if number > done and number % self.every == 0:
                self.save()
            RNGManager.set_random_seeds(self._epoch_seed + number)
            batch = next(batches, None)
            if batch is None:
                return
            if number >= done:
                yield batch


class ResumableNaive(Resumable, Naive):
    """Naive, saved in the middle also. Any other strategy that trains in epochs can stand in its place."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the file; metrics are written next to it")
    parser.add_argument("--every", type=int, default=100, help="iterations from save to save (default: 100)")
    parser.add_argument("--images", type=int, help="training images a task (default: all)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    benchmark = split_mnist(5, dataset_root=MNIST)
    if arguments.images is not None:
        train_sets = [experience.dataset[: arguments.images] for experience in benchmark.train_stream]
        benchmark = benchmark_of(train_sets, [experience.dataset for experience in benchmark.test_stream])
    model = SimpleMLP(num_classes=10, hidden_size=256)
    strategy = ResumableNaive(
        checkpoint=arguments.checkpoint,
        every=arguments.every,
        model=model,
        optimizer=SelectivePlasticityOptimizer.for_continual_learning(model.parameters(), with_gate=True),
        criterion=JointReplayLoss(OneHotMSELoss()),
        train_mb_size=64,
        eval_mb_size=500,
        plugins=[ReplayPlugin(mem_size=200), SelectivePlasticityPlugin()],
        evaluator=EvaluationPlugin(
            *selective_plasticity_metrics(), loggers=[MetricsCSVLogger(arguments.checkpoint.with_suffix(".csv"))]
        ),
    )
    strategy, first = maybe_load_checkpoint(strategy, arguments.checkpoint)
    print(f"{first} tasks trained, {strategy.clock.train_iterations} iterations in all", flush=True)
    for experience in benchmark.train_stream[first:]:
        strategy.train(experience, drop_last=True)
        metrics = strategy.eval(benchmark.test_stream)
        strategy.save()
    print(f"ACC {metrics['ACC_Percent/eval_phase/test_stream']:.2f}%")


if __name__ == "__main__":
    main()
