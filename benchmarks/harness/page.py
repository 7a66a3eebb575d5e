"""The page of results, docs/results.md: every sentence that depends on results is made from what the tests say."""

from __future__ import annotations

from collections.abc import Iterable

from tabulate import tabulate

from harness.comparison import ALPHA, Cell, Difference, against_others, cells_of, differences, steps
from harness.protocols import PROTOCOLS
from harness.settings import NETWORKS
from harness.statistics import wilcoxon
from harness.studies import (
    ABLATIONS,
    ALONE,
    BY_BUFFER,
    EPOCHS,
    ORIGINAL,
    OURS,
    PUBLISHED,
    ROBUSTNESS,
    TASK_LABELS,
    WITH_AND_WITHOUT,
    Study,
)

SPREAD = 2  # points that published figures of one method and protocol differ by
FIGURES = {"buffers": "results/buffers.png", "training": "results/buffers_split5/training.png"}

INTRODUCTION = f"""# Selective plasticity beside stored samples

`{OURS}` is `SelectivePlasticityPlugin` and `SelectivePlasticityOptimizer` beside Avalanche's `ReplayPlugin`, with one
set of defaults for every buffer; `{ALONE}` is the same without a buffer. `sp-gaussian` and `sp-replay-gaussian` replay
samples drawn from `GaussianBuffer`, too; `gaussian-replay` and `replay-gaussian` are these two without any gate: their
controls. What is drawn counts as no stored sample. The comparisons have as many stored samples, batches of as many of
them, and, in each seed, the same network, initial weights, order of data and steps of the stream. `gdumb` alone trains
on its buffer instead, as often as it was tuned to; `cumulative` and `joint` have all data. Each strategy was tuned on
validation images with seeds that are not reported ([experiments.md](experiments.md)).

A figure is the mean of test accuracy over all tasks, after the last one, with its 95% bootstrap interval. Differences
are paired by seed. "Above" and "below" mean p < {ALPHA} in Wilcoxon's signed-rank test, with Holm's correction over
the comparisons at one buffer; "level" is everything else. The effect is the rank-biserial correlation: 1 if every
seed gains, -1 if every seed loses.

`make results` writes this page and its figures from the runs in the folders of `docs/results`; `make results-rerun`
trains what they lack.
"""


def page(results: dict[str, list[dict]]) -> str:
    """The page's text.

    Args:
        results: records by study; one without any is left out.
    """
    parts = [INTRODUCTION]
    parts += _section("Accuracy against buffer size", _by_buffer, BY_BUFFER, results)
    parts += _section("More epochs", _epochs, EPOCHS, results)
    parts += _section("Other rates, batches and epochs", _robustness, ROBUSTNESS, results)
    parts += _section("While the tasks are learned", _training, BY_BUFFER, results)
    parts += _section("What each part does", _ablations, ABLATIONS, results)
    parts += _section("A head for each task", _task_labels, TASK_LABELS, results)
    parts += _section("The original protocol", _original, ORIGINAL, results)
    parts += _section("Published figures", _published, PUBLISHED, results)
    parts += _section("What it costs", _cost, BY_BUFFER, results)
    return "\n".join(parts)


def _section(heading: str, write, studies: dict[str, Study], results: dict[str, list[dict]]) -> list[str]:
    present = {name: (study, cells_of(study, results[name])) for name, study in studies.items() if results.get(name)}
    body = [text for name, (study, cells) in present.items() for text in write(name, study, cells)]
    return [f"## {heading}\n", *body] if body else []


# -- Sections: each writes what it has to say of one study ------------------------------------------------------------


def _by_buffer(name: str, study: Study, cells: list[Cell]) -> list[str]:
    texts = [_heading(study, cells)]
    if name == next(iter(BY_BUFFER)):
        texts.insert(0, f"![Accuracy against the number of stored samples]({FIGURES['buffers']})\n")
    texts.append(_grid(cells))
    for ours in WITH_AND_WITHOUT:
        texts += [*_verdicts(cells, ours), _growth(cells, ours)]
    return texts


def _epochs(name: str, study: Study, cells: list[Cell]) -> list[str]:
    return [_heading(study, cells), _grid(cells), *_verdicts(cells)]


def _robustness(name: str, study: Study, cells: list[Cell]) -> list[str]:
    usual = {c.label: c for c in cells if c.label == c.strategy}
    rows: dict[str, dict] = {}
    for c in cells:
        change = c.label.partition(", ")[2] or "as tuned"
        row, base = rows.setdefault(change, {"": change}), usual.get(c.strategy)
        row[c.strategy] = c.shown() + ("" if c is base or base is None else f" ({c.mean() - base.mean():+.1f})")
    return [
        "One change at a time, everything else as it was tuned, and without any stored sample; in brackets the change "
        "of ACC. With random classes each seed draws which of them come together, and when. `joint` has all data at "
        "once: what it loses is not forgotten but never learned. A figure or a seed that is missing is of runs that "
        "diverged.\n",
        _heading(study, cells),
        _table(rows.values()),
    ]


def _training(name: str, study: Study, cells: list[Cell]) -> list[str]:
    watched = [c for c in cells if c.buffer in study.curves and any(r.get("curve") for r in c.records.values())]
    if not watched:
        return []
    rows = [
        {"strategy": c.label, "buffer": c.buffer or "-", "worst case %": c.shown("min_acc"), "ACC %": c.shown()}
        for c in watched
        if c.strategy != "joint"
    ]
    return [
        f"{study.title}. The worst case is the lowest accuracy that a task falls to at any time after it was "
        "learned, mean over the tasks but the last (min-ACC). It is measured on 1000 test images a task, at 15 points "
        "of every experience, five of them among its first 20 steps.\n",
        f"![Accuracy of each task while the tasks are learned]({FIGURES['training']})\n",
        _table(rows),
    ]


def _ablations(name: str, study: Study, cells: list[Cell]) -> list[str]:
    rows: dict[str, dict] = {}
    ours = OURS if any(c.label == OURS for c in cells) else ALONE
    for buffer, found in against_others(cells, ours).items():
        for d in found:
            row = rows.setdefault(d.other.label, {f"`{ours}` minus": d.other.label})
            row[_column(buffer)] = f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}], {d.verdict}"
    return [_heading(study, cells), _grid(cells), _table(rows.values())] if rows else []


def _task_labels(name: str, study: Study, cells: list[Cell]) -> list[str]:
    rows = [
        {"strategy": c.label, "buffer": c.buffer or "-", "ACC %": c.shown(), "BWT %": c.shown("bwt")}
        | {"right after learning %": c.shown("learning_acc"), "extra kB": f"{c.mean('extra_memory_bytes') / 1000:.0f}"}
        for c in cells
    ]
    each = []
    for ours in (c for c in cells if c.label in (ALONE, OURS)):
        if found := differences(ours, [c for c in cells if c is not ours]):
            each.append(f"- `{ours.label}` is {_listed(found)}.")
    return [
        "Task-incremental: task labels choose a head of Avalanche's `MultiHeadClassifier`, in training and in tests. "
        "That is far easier than one head for all, and no figure here is comparable with any above. `packnet` (A. "
        "Mallya, S. Lazebnik, CVPR 2018) is Avalanche's: the tasks share out the hidden layers' weights. It trains one "
        "epoch, prunes, and trains what is left for another, so all rows have two epochs. The random features, OWM and "
        "GPM have one head in this harness, and the methods that store samples other than replay are tuned for one.\n",
        _heading(study, cells),
        _table(rows),
        *each,
        "",
    ]


# What is to be said before each part of the section on the original protocol.
_ORIGINAL = {
    "original": "What was first published, reproduced in [original.md](original.md): the gate's rule on SGD, and a "
    "first-in-first-out buffer that takes replayed samples in again, half as many in a batch as new ones. "
    "`legacy-control` is `legacy-sp-replay` with its gate fixed at 1.\n",
    "protocol_original": "The same tasks, epochs and buffer with Avalanche's replay, tuned rates, other methods and "
    "the present gates, one stored sample in a batch for each new one. What was first published, and what came of it, "
    "is in [original.md](original.md).\n",
}


def _original(name: str, study: Study, cells: list[Cell]) -> list[str]:
    rows = [
        {"strategy": c.label, "buffer": c.buffer or "-", "ACC %": c.shown()}
        | {f"task {t} %": f"{value:.1f}" for t, value in zip("AB", _last(c))}
        for c in cells
    ]
    texts = [_ORIGINAL.get(name, ""), _heading(study, cells), _table(rows)]
    texts += [text for ours in WITH_AND_WITHOUT for text in _verdicts(cells, ours)]
    gate, control = ([c for c in cells if c.label == label] for label in ("legacy-sp-replay", "legacy-control"))
    for d in differences(gate[0], control) if gate else []:
        texts.append(
            f"The published gate changes ACC by {d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}] points (`legacy-sp-replay` "
            f"minus `legacy-control`, paired by seed; p = {d.p:.3f}).\n"
        )
    return [text for text in texts if text]


def _published(name: str, study: Study, cells: list[Cell]) -> list[str]:
    protocol = PROTOCOLS[study.benchmark][study.protocol]
    rows: list[dict] = []
    found: dict[bool, list[str]] = {True: [], False: []}
    for c in cells:
        published = protocol.published.get((c.strategy, c.buffer))
        rows.append(
            {
                "strategy": c.label,
                "buffer": c.buffer or "-",
                "published %": "-" if published is None else f"{published:.1f}",
                "here %": c.shown(),
                "difference": "-" if published is None else f"{c.mean() - published:+.1f}",
            }
        )
        if published is not None:
            gap = c.mean() - published
            found[abs(gap) <= SPREAD].append(f"{c.label}{f' with {c.buffer}' if c.buffer else ''} ({gap:+.1f})")
    near, far = (_and(names) if names else "none" for names in (found[True], found[False]))
    return [
        _heading(study, cells),
        _table(rows),
        f"Published: {protocol.source}. {protocol.note}".rstrip()
        + f" Within {SPREAD} points of what was published, which is what papers differ by on equal methods: {near}; "
        f"farther off: {far}.\n",
    ]


def _cost(name: str, study: Study, cells: list[Cell]) -> list[str]:
    shown = [c for c in cells if c.buffer in study.curves]
    reference = next((c.mean("seconds") for c in shown if c.label == "replay-joint"), None)
    if reference is None:
        return []
    rows = [
        {
            "strategy": c.label,
            "buffer": c.buffer or "-",
            "seconds": f"{c.mean('seconds'):.1f}",
            "times replay-joint": f"{c.mean('seconds') / reference:.2f}",
            "extra kB": f"{max(c.values('extra_memory_bytes').values()) / 1000:.0f}",
        }
        for c in shown
    ]
    what = "training alone, on one thread, and what is kept beyond the network and its optimizer"
    return [f"{study.title}: {what}.\n", _table(rows)]


# -- Their parts ------------------------------------------------------------------------------------------------------


def _heading(study: Study, cells: list[Cell]) -> str:
    seeds = [len(c.records) for c in cells]
    number = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    epochs = f"{study.epochs} epoch{'s' * (study.epochs > 1)}"
    number += f" seed{'s' * (max(seeds) > 1)}"
    return f"**{study.title}**: {epochs}, batch {study.batch_size}, {NETWORKS[study.network]}, {number}.\n"


def _grid(cells: list[Cell]) -> str:
    """Rows by strategy, columns by buffer."""
    buffers = sorted({c.buffer for c in cells})
    rows: dict[str, dict] = {}
    for c in cells:
        row = rows.setdefault(c.label, {"strategy": c.label} | {_column(b): "" for b in buffers})
        row[_column(c.buffer)] = c.shown()
    return _table(rows.values())


def _column(buffer: int) -> str:
    return str(buffer) if buffer else "no buffer"


def _verdicts(cells: list[Cell], name: str = OURS) -> list[str]:
    """Ours against the best of the others at each buffer, and against each of them in words."""
    found = against_others(cells, name)
    if not found:
        return []
    table = []
    for buffer, rows in found.items():
        best = max(rows, key=lambda row: row.other.mean())
        table.append(
            {
                "buffer": buffer,
                "best of the others": f"{best.other.label} {best.other.mean():.1f}",
                f"{name} minus it": f"{best.mean:+.1f} [{best.low:+.1f}, {best.high:+.1f}]",
                "p (Holm)": f"{best.p:.3f}",
                "effect": f"{best.effect:+.2f}",
                "verdict": best.verdict,
            }
        )
    each = [f"- With {buffer} stored samples `{name}` is {_listed(rows)}." for buffer, rows in found.items()]
    return [_table(table), _summary(found, name), *each, ""]


def _summary(found: dict[int, list[Difference]], name: str) -> str:
    most = max(row.seeds for rows in found.values() for row in rows)
    if wilcoxon([1.0] * most) >= ALPHA:
        return f"With {most} seeds no difference can be significant.\n"
    above = [str(b) for b, rows in found.items() if all(row.verdict == "above" for row in rows)]
    below = [str(b) for b, rows in found.items() if any(row.verdict == "below" for row in rows)]
    texts = [
        f"above every other row {f'with {_and(above)} stored samples' if above else 'at none of them'}",
        f"below at least one with {_and(below)}" if below else "below none with any",
    ]
    return f"`{name}` is {texts[0]}, and {texts[1]}.\n"


def _listed(rows: list[Difference]) -> str:
    """Above A and B; level with C."""
    parts = []
    for verdict, words in (("above", "above"), ("level", "level with"), ("below", "below")):
        names = [f"{row.other.label} ({row.mean:+.1f})" for row in rows if row.verdict == verdict]
        if names:
            parts.append(f"{words} {_and(names)}")
    return "; ".join(parts)


def _growth(cells: list[Cell], name: str) -> str:
    """Whether more memory ever hurts."""
    found = steps(cells, name)
    if not found:
        return ""
    falls = [
        f"from {row.other.buffer} on ({row.mean:+.1f} [{row.low:+.1f}, {row.high:+.1f}])"
        for row in found
        if row.verdict == "below"
    ]
    what = f"it falls significantly {_and(falls)}" if falls else "it never falls significantly"
    smallest = min(found, key=lambda row: row.mean)
    line = f"`{name}` (`{WITH_AND_WITHOUT[name]}` where there is none)"
    return f"From each buffer to the next, {line} changes by {smallest.mean:+.1f} points at the least; {what}.\n"


def _last(cell: Cell) -> list[float]:
    finals = [record["accuracy_matrix"][-1] for record in cell.records.values()]
    return [sum(values) / len(values) for values in zip(*finals)]


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(rows: Iterable[dict]) -> str:
    return tabulate(list(rows), headers="keys", tablefmt="github", disable_numparse=True) + "\n"
