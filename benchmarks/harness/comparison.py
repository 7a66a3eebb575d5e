"""One study's results: its rows by buffer, and what tests of significance say of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.settings import settings_of
from harness.statistics import bootstrap, holm, rank_biserial, wilcoxon
from harness.studies import BEST_WITHOUT, OURS, WITH_AND_WITHOUT, Study

ALPHA = 0.05


@dataclass(frozen=True)
class Cell:
    """The runs of one row with one buffer, by seed."""

    label: str
    strategy: str
    buffer: int
    records: dict[int, dict]

    def values(self, measure: str = "acc") -> dict[int, float]:
        return {seed: record[measure] for seed, record in self.records.items()}

    def mean(self, measure: str = "acc") -> float:
        return float(np.mean(list(self.values(measure).values())))

    def shown(self, measure: str = "acc") -> str:
        """Mean and interval."""
        if any(value is None for value in self.values(measure).values()):
            return "-"
        if len(self.records) == 1:
            return f"{self.mean(measure):.1f}"
        low, high = bootstrap(list(self.values(measure).values()))
        return f"{self.mean(measure):.1f} [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True)
class Difference:
    """ACC of ours minus another's, paired by seed; p is corrected for the comparisons that it is one of."""

    other: Cell
    mean: float
    low: float
    high: float
    effect: float
    seeds: int
    p: float

    @property
    def verdict(self) -> str:
        if self.p >= ALPHA:
            return "level"
        return "above" if self.mean > 0 else "below"


def cells_of(study: Study, records: list[dict]) -> list[Cell]:
    """The study's cells that there are results for, in the order of its rows."""
    labels = study.labels()
    groups: dict[tuple[str, int], dict[int, dict]] = {}
    for record in records:
        run = record["run"]
        groups.setdefault((labels[settings_of(run)], run["replay_buffer"]), {})[run["seed"]] = record
    order = list(dict.fromkeys(labels.values()))
    return [
        Cell(label, next(iter(groups[label, buffer].values()))["run"]["strategy"], buffer, groups[label, buffer])
        for label, buffer in sorted(groups, key=lambda group: (order.index(group[0]), group[1]))
    ]


def differences(ours: Cell, others: list[Cell]) -> list[Difference]:
    """Ours minus each of the others, as one family of comparisons."""
    found = []
    for other in others:
        a, b = ours.values(), other.values()
        gains = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
        if len(gains) > 1:
            found.append((other, gains))
    ps = holm([wilcoxon(gains) for _, gains in found])
    return [
        Difference(other, float(np.mean(gains)), *bootstrap(gains), rank_biserial(gains), len(gains), p)
        for (other, gains), p in zip(found, ps)
    ]


def against_others(cells: list[Cell], name: str = OURS) -> dict[int, list[Difference]]:
    """By buffer: ours minus every other row with as many stored samples, and minus the best ones without any."""
    found = {}
    for ours in (c for c in cells if c.label == name):
        others = [c for c in cells if c.label in BEST_WITHOUT or c.buffer == ours.buffer]
        found[ours.buffer] = differences(ours, [c for c in others if c is not ours])
    return {buffer: rows for buffer, rows in found.items() if rows}


def steps(cells: list[Cell], name: str = OURS) -> list[Difference]:
    """Ours with each buffer minus ours with the next smaller one, beginning without any."""
    ours = sorted((c for c in cells if c.label in (name, WITH_AND_WITHOUT[name])), key=lambda c: c.buffer)
    found = [differences(larger, [smaller]) for smaller, larger in zip(ours, ours[1:])]
    rows = [row for rows in found for row in rows]
    ps = holm([row.p for row in rows])
    return [Difference(**{**vars(row), "p": p}) for row, p in zip(rows, ps)]
