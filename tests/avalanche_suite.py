"""Avalanche's own tests of training, with this package in every strategy.

    python tests/avalanche_suite.py CHECKOUT [plugin|optimizer] [PATHS OF TESTS IN IT]

CHECKOUT is a clone of https://github.com/ContinualAI/avalanche at the tag of the installed version. With "plugin" (the
default) a SelectivePlasticityPlugin is appended to every strategy's plugins. With "optimizer" a
SelectivePlasticityOptimizer takes the place of torch's SGD. The tests run without and with it. Printed are the tests
that fail only with it. The exit status is 1 if there is any.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

_WITH = "AVALANCHE_SUITE_WITH"  # an environment variable: what the process that runs the tests adds
_TESTS = ["tests/training", "tests/test_optimizer.py"]


def _append_plugin() -> None:
    from avalanche.training.templates.base import BaseTemplate

    from avalanche_sp import SelectivePlasticityPlugin

    original = BaseTemplate.__init__

    def with_plugin(self, *args, **kwargs):
        original(self, *args, **kwargs)
        # A strategy without an optimizer, as StreamingLDA, has no updates to gate.
        if issubclass(SelectivePlasticityPlugin, self.PLUGIN_CLASS) and kwargs.get("optimizer", self) is not None:
            self.plugins.append(SelectivePlasticityPlugin())

    BaseTemplate.__init__ = with_plugin


def _replace_optimizer() -> None:
    import torch

    from avalanche_sp.optim import SelectivePlasticityOptimizer

    class SGD(SelectivePlasticityOptimizer):
        def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, **kwargs):
            super().__init__(params, **{"lr": lr, "weight_decay": weight_decay, **kwargs})

    SGD.__module__, SGD.__qualname__ = "torch.optim", "SGD"  # where a checkpoint finds it
    torch.optim.SGD = SGD  # type: ignore


def failures(checkout: Path, tests: list[str], with_: str) -> dict[str, str]:
    """Names and last lines of the tests that fail, run in a process of their own."""
    here = str(Path(__file__).resolve().parent)
    paths = os.pathsep.join([str(checkout), here, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {_WITH: with_, "PYTHONPATH": paths, "FAST_TEST": "True"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "avalanche_suite", "--tb=line"]
        command += ["-p", "no:cacheprovider", f"--rootdir={checkout}", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        found = {}
        for case in cases:
            for kind in ("failure", "error"):
                for problem in case.iter(kind):
                    found[f"{case.get('classname')}.{case.get('name')}"] = (problem.get("message") or "").split("\n")[0]
        return found


def main(arguments: list[str]) -> int:
    if not arguments or not (Path(arguments[0]) / "tests").is_dir():
        print(__doc__)
        return 2
    checkout, rest = Path(arguments[0]).resolve(), arguments[1:]
    with_ = rest.pop(0) if rest and rest[0] in _CHANGES else "plugin"
    tests = rest or _TESTS
    before, after = failures(checkout, tests, ""), failures(checkout, tests, with_)
    new = {name: message for name, message in after.items() if name not in before}
    for name, message in new.items():
        print(f"{name}: {message[:200]}")
    print(f"{len(new)} fail with the {with_} alone; {len(before)} fail without it")
    return bool(new)


_CHANGES = {"plugin": _append_plugin, "optimizer": _replace_optimizer}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif os.environ.get(_WITH):
    _CHANGES[os.environ[_WITH]]()
