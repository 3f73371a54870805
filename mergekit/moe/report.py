"""The routing report: where a mixture sends tokens whose expert is known, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit.errors import CheckpointError

__all__ = ["LayerRouting", "RoutingReport", "routing_report"]

_SHADES = "\u2591\u2592\u2593\u2588"
_WIDTH = 12


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One layer's figures; tuples have an entry for each expert.

    ``accuracy``: the share of the tokens of an expert's prompts whose likeliest expert it is, None without prompts.
    ``load``: its share of all places (token, chosen expert), prompts of every expert weighing the same.
    ``entropy``: of the router's probabilities over all experts, the mean over tokens in nats.
    """

    accuracy: tuple[float | None, ...]
    load: tuple[float, ...]
    entropy: float


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """How well prompts find the experts that they are for.

    ``tokens`` counts those measured for each expert; ``is_held_out`` says for each whether its prompts were kept out
    of the calibration. ``degenerate``: layers whose router rows hardly tell some experts apart. ``notes``: what could
    not be measured, and why.
    """

    experts: tuple[str, ...]
    experts_per_token: int
    layers: tuple[LayerRouting, ...]
    tokens: tuple[int, ...]
    is_held_out: tuple[bool, ...]
    degenerate: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The mean accuracy over layers and experts, None if nothing was measured."""
        found = [a for layer in self.layers for a in layer.accuracy if a is not None]
        return sum(found) / len(found) if found else None

    @property
    def entropy_share(self) -> float:
        """The mean entropy over layers as a share of log E, the entropy of equal probabilities; 0 for one expert."""
        highest = len(self.layers) * math.log(len(self.experts))
        return sum(layer.entropy for layer in self.layers) / highest if highest else 0.0

    def summary(self) -> str:
        """The result in one line."""
        if self.accuracy is None:
            return "routing was not measured: no prompts"
        kinds = ["held-out"] * any(self.is_held_out) + ["calibration"] * (not all(self.is_held_out))
        return (
            f"routing: {_percent(self.accuracy)} of {sum(self.tokens)} {' and '.join(kinds)} tokens find their expert "
            f"(by chance {_percent(1 / len(self.experts))}); entropy {_percent(self.entropy_share)} of the highest"
        )

    def remarks(self) -> list[str]:
        """What tempers the figures, a line each."""
        found = list(self.notes)
        if self.accuracy is None:
            return found
        seen = [name for name, kept in zip(self.experts, self.is_held_out, strict=True) if not kept]
        if seen:
            who = "all experts" if len(seen) == len(self.experts) else ", ".join(seen)
            found.append(f"optimistic: {who} measured with the prompts that the routers were made from")
        if self.degenerate:
            found.append(f"router rows hardly tell some experts apart in layers {_ranges(self.degenerate)}")
        if self.experts_per_token == len(self.experts) > 1:
            found.append("every token goes to every expert: loads are equal, only the weights differ")
        return found

    def to_json(self) -> str:
        """The report as a JSON document, figures to six decimals."""
        record = asdict(self) | {"accuracy": self.accuracy, "entropy_share": self.entropy_share}
        return json.dumps(_rounded(record), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def of_json(cls, record: Mapping[str, Any], place: str) -> RoutingReport:
        """The report that ``to_json`` wrote; CheckpointError, naming ``place``, if it is not one."""
        try:
            experts = tuple(map(str, record["experts"]))
            layers = tuple(
                LayerRouting(
                    tuple(None if share is None else float(share) for share in layer["accuracy"]),
                    tuple(float(share) for share in layer["load"]),
                    float(layer["entropy"]),
                )
                for layer in record["layers"]
            )
            report = cls(
                experts=experts,
                experts_per_token=int(record["experts_per_token"]),
                layers=layers,
                tokens=tuple(int(count) for count in record["tokens"]),
                is_held_out=tuple(map(bool, record["is_held_out"])),
                degenerate=tuple(int(layer) for layer in record["degenerate"]),
                notes=tuple(map(str, record["notes"])),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{place}: not a routing report of mergekit ({error!s:.80})") from None
        counts = [len(shares) for layer in layers for shares in (layer.accuracy, layer.load)]
        if {len(experts), len(report.tokens), len(report.is_held_out), *counts} != {len(experts) or -1}:
            raise CheckpointError(f"{place}: not a routing report of mergekit (its lists differ in length)")
        return report

    def table(self) -> list[str]:
        """Lines for a terminal: the summary, a line for each layer, the remarks."""
        if self.accuracy is None:
            return [self.summary(), *self.remarks()]
        names = _columns(self.experts)
        widths = [max(5, len(name)) for name in names]

        def cells(values: Iterable[str]) -> str:
            return "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))

        blank = " " * len(cells(names))
        lines = [
            self.summary(),
            f"       {'right':{len(blank)}}  |  load",
            f"layer  {cells(names)}  |  {cells(names)}  |  entropy",
        ]
        for number, layer in enumerate(self.layers):
            right, load = (cells(map(_percent, values)) for values in (layer.accuracy, layer.load))
            lines.append(f"{number:>5}  {right}  |  {load}  |  {layer.entropy:>7.2f}")
        return [*lines, *self.remarks()]

    def markdown(self) -> str:
        """The report as a heat map: a Markdown table with a row for each layer, darker blocks for higher figures."""
        summary = self.summary()
        lines = [f"{summary[0].upper()}{summary[1:]}.", ""]
        if self.accuracy is not None:
            names = [name.replace("|", "\\|") for name in _columns(self.experts)]
            head = ["layer", *(f"{n} right" for n in names), *(f"{n} load" for n in names), "entropy"]
            even = 1 / len(self.experts)
            rows = [head, ["---:"] * len(head)]
            for number, layer in enumerate(self.layers):
                right = [_shaded(value, value) for value in layer.accuracy]
                load = [_shaded(value, value / even / 2) for value in layer.load]
                rows.append([str(number), *right, *load, f"{layer.entropy:.2f}"])
            lines += [f"| {' | '.join(row)} |" for row in rows]
            lines += [
                "",
                f"*right*: the share of tokens of an expert's prompts whose likeliest expert it is; *load*: the share "
                f"of tokens sent to it, {_percent(even)} if even; *entropy*: of the probabilities, at most "
                f"{math.log(len(names)):.2f} nats.",
                "",
            ]
        lines += [f"- {text}" for text in self.remarks()]
        return "\n".join(lines).rstrip() + "\n"


def routing_report(
    chosen: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    expert: NDArray[np.int64],
    names: Sequence[str],
    is_held_out: Sequence[bool],
    *,
    degenerate: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> RoutingReport:
    """The report of tokens of ``expert`` [tokens] that were sent to ``chosen`` [layers, tokens, experts per token].

    The likeliest comes first in ``chosen``; ``probabilities`` [layers, tokens, experts] are the router's.
    """
    counts = np.bincount(expert, minlength=len(names))
    # Experts with many prompts must not outweigh the others.
    weight = 1.0 / (counts[expert] * np.count_nonzero(counts))
    layers = []
    for choice, likely in zip(chosen, probabilities.astype(np.float64), strict=True):
        is_right = choice[:, 0] == expert
        accuracy = tuple(float(is_right[expert == e].mean()) if counts[e] else None for e in range(len(names)))
        places = choice.shape[1]
        load = np.bincount(choice.reshape(-1), np.repeat(weight, places), minlength=len(names)) / places
        surprise = -np.log(np.maximum(likely, np.finfo(np.float64).tiny))
        layers.append(LayerRouting(accuracy, tuple(load.tolist()), float(weight @ (likely * surprise).sum(1))))
    return RoutingReport(
        experts=tuple(names),
        experts_per_token=chosen.shape[2],
        layers=tuple(layers),
        tokens=tuple(counts.tolist()),
        is_held_out=tuple(is_held_out),
        degenerate=tuple(degenerate),
        notes=tuple(notes),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _shaded(value: float | None, darkness: float | None) -> str:
    """A figure in percent behind a block, from light (0) to full (1)."""
    if value is None or darkness is None:
        return "-"
    return f"{_SHADES[min(3, int(4 * darkness))]} {100 * value:.0f}"


def _columns(names: Sequence[str]) -> list[str]:
    """Short names for columns: the end of a path or hub name, numbered where that is not enough."""
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    short = [name if len(name) <= _WIDTH else f"{name[: _WIDTH - 1]}\u2026" for name in short]
    return short if len(set(short)) == len(short) else [f"{i} {name}"[:_WIDTH] for i, name in enumerate(short)]


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order with runs put together: 0, 2-5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
