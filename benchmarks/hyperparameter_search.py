"""Searches a strategy's settings on validation images, with Optuna; several processes may share one search.

python benchmarks/hyperparameter_search.py --benchmark split-mnist --tasks 5 --strategy sp --trials 60
"""

import argparse
import sys
from concurrent.futures import FIRST_COMPLETED, wait

from tqdm import tqdm

from harness.cli import add_common, add_training, override, positive
from harness.executors import open_executor, result_of
from harness.settings import STRATEGIES, STUDIES, USES_REPLAY, Run, code_fingerprint, strategies_of

TASKS = {"split-mnist": (2, 5, 10), "permuted-mnist": None}


def parser() -> argparse.ArgumentParser:
    names = STRATEGIES + tuple(dict.fromkeys(name for study in STUDIES.values() for name in study))
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--benchmark", choices=TASKS, default="split-mnist", help="what is learned")
    p.add_argument("--strategy", choices=names, required=True, metavar="NAME", help=", ".join(names))
    p.add_argument("--trials", type=positive, default=50, help="of the whole search, with those already finished")
    p.add_argument("--tasks", type=positive, help="experiences (split-mnist: 2, 5 or 10; permuted-mnist: any)")
    p.add_argument("--train-per-task", type=positive, help="training images a task of permuted-mnist (all: 50000)")
    add_training(p)
    p.add_argument("--replay-buffer", type=positive, default=200, help="stored samples, of a strategy with replay")
    add_common(p, seeds=2, output="search")
    p.set_defaults(first_seed=100)
    p.add_argument("--set", type=override, action="append", default=[], metavar="NAME=VALUE", help="hold a setting")
    p.add_argument(
        "--layers", type=lambda text: tuple(text.split(",")), default=(), metavar="A,B",
        help="search the openness of each of these layers by itself; the best goes to profile.json, for the plugin",
    )  # fmt: skip
    p.add_argument("--storage", metavar="URL", help="a database for Optuna (none: a file in the output folder)")
    return p


def search_of(p: argparse.ArgumentParser, args: argparse.Namespace):
    from harness.search import Search  # here, as Optuna is not everybody's

    tasks = args.tasks or {"split-mnist": 2, "permuted-mnist": 10}[args.benchmark]
    allowed = strategies_of(args.benchmark)
    if args.strategy not in allowed:
        p.error(f"--strategy {args.strategy}: not on {args.benchmark} (allowed: {', '.join(allowed)})")
    if TASKS[args.benchmark] and tasks not in TASKS[args.benchmark]:
        p.error(f"--tasks {tasks}: not on {args.benchmark} (allowed: 2, 5, 10)")
    if args.train_per_task is not None and args.benchmark == "split-mnist":
        p.error(f"--train-per-task {args.train_per_task}: not on split-mnist (allowed on permuted-mnist)")
    run = Run(
        benchmark=args.benchmark,
        strategy=args.strategy,
        n_tasks=tasks,
        epochs=args.epochs,
        batch_size=args.batch_size,
        replay_buffer=args.replay_buffer if args.strategy in USES_REPLAY else 0,
        seed=args.first_seed,
        train_per_task=args.train_per_task,
        network=args.network,
        validation=True,
        overrides=tuple(sorted(args.set)),
    )
    try:
        return Search(
            run,
            args.seeds,
            args.trials,
            args.output.resolve(),
            args.dataset_root,
            code_fingerprint(),
            args.storage,
            args.layers,
        )
    except ValueError as error:
        p.error(str(error))


def work_all(search, executor, jobs: int) -> None:
    """Keeps ``jobs`` trials running until the study has all of its.

    Raises:
        ValueError: for settings that can't be.
        OSError: the study or the results can't be written, or the scheduler is gone.
        RuntimeError: a worker can't do its work.
    """
    from harness.search import finished, work

    study = search.study()
    pending = {executor.submit(work, search) for _ in range(jobs)}
    with tqdm(total=search.trials, initial=len(finished(study)), unit="trial", file=sys.stdout) as progress:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    trial = result_of(future)
                except (ValueError, OSError):
                    raise
                except Exception as error:  # its process died, again and again, or has other code
                    raise RuntimeError(f"a worker failed: {error}") from error
                if trial is None:
                    continue
                pending.add(executor.submit(work, search))
                if trial["value"] is not None:
                    progress.set_postfix_str(f"trial {trial['number']}: {trial['value']:.2f}", refresh=False)
            progress.update(len(finished(study)) - progress.n)


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        import optuna  # noqa: F401
    except ImportError:
        p.error("needs Optuna: pip install '.[search]'")
    search = search_of(p, args)
    from harness.search import finished
    from harness.search_report import write_search

    try:
        search.output.mkdir(parents=True, exist_ok=True)
        search.study()
    except Exception as error:  # whatever the database's driver says
        p.error(f"--storage {search.storage}: {error}") if search.storage else p.error(str(error))
    go_on = f"Finished trials are in {search.storage or search.output}; the same command goes on from there."
    print(f"{search.trials} trials of {search.seeds} runs; results go to {search.output}", flush=True)
    try:
        with open_executor(args.jobs, args.scheduler) as executor:
            try:
                work_all(search, executor, args.jobs)
            except BaseException:
                executor.shutdown(wait=False)
                raise
        for path in write_search(search, search.study()):
            print(path)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {go_on}", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except (OSError, ImportError, RuntimeError) as error:
        print(f"\nStopped: {error}. {go_on}", file=sys.stderr)
        return 1
    failed = [t for t in finished(search.study()) if "error" in t.user_attrs]
    if failed:
        print(f"{len(failed)} trials failed: their errors are in {search.output / 'trials.csv'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
