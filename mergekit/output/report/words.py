"""A report in plain words: what the merge did, and what a person should look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mergekit.errors import some_of
from mergekit.output.report.data import ReportData
from mergekit.output.report.grids import shown
from mergekit.output.stats import LEAST_SURVIVAL, pooled

__all__ = ["Finding", "findings", "summary", "totals"]

_RATIO = 0.8, 1.25
_ALIKE, _OPPOSED = 0.8, -0.15
"""Cosines of changes that are worth a word."""


class Finding(NamedTuple):
    """A remark: ``warning`` is a reason to act, ``look`` one to look, ``good`` is none."""

    level: Literal["warning", "look", "good"]
    text: str


def summary(data: ReportData, method_title: str) -> str:
    """What the merge did, in a sentence or two."""
    has, made = ("has", "was") if data.is_done else ("would have", "would be")
    layers = sum(row.isdecimal() for row in data.rows)
    of = f" in {layers} layers" if layers else ""
    size = f"The result {has} {data.size:,} parameters{of}{f', as {_and(data.dtypes)}' if data.dtypes else ''}."
    if mixture := data.mixture:
        shared = {
            "base": f"are those of {data.models[0]}" if data.models else "",
            "average": "are the average of the experts' models",
        }
        rest = shared.get(mixture.shared or "", "come from where the recipe says")
        return (
            f"A mixture of {len(mixture.names)} experts {made} made of {_and(list(dict.fromkeys(mixture.names)))}. "
            f"A router in each layer sends every token through {mixture.per_token} of them; all other weights {rest}. "
            f"{size}"
        )
    others = [name for place, name in enumerate(data.names) if place != data.base]
    base = "" if data.base is None else f" onto {data.names[data.base]}"
    counts = ""
    if data.statistics:
        merged, copied = len(data.statistics.tensors), data.statistics.copied
        counts = f" {merged:,} tensors were computed" + (f" and {copied:,} copied." if copied else ".")
    were = "were" if data.is_done else "would be"
    return f"{_and(others) or 'The models'} {were} merged{base} by {method_title}.{counts} {size}"


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def totals(data: ReportData) -> list[tuple[str, str]]:
    """The figures of all merged tensors taken as one vector, by name."""
    if not data.statistics or not data.statistics.tensors:
        return []
    found = pooled(list(data.statistics.tensors.values()))
    rows = [
        ("computed tensors", f"{len(data.statistics.tensors):,}"),
        ("elements in them", f"{found['elements']:,}"),
        ("copied tensors", f"{data.statistics.copied:,}"),
        ("length of the result", shown(found["result"])),
    ]
    onto = "change" in found
    base = found["norms"].get(data.base) if onto else None
    for model, length in found.get("deltas", {}).items():
        rows.append((f"how far {data.names[model]} moved", _relative(length, base)))
    if onto:
        rows.append(("how far the result moved", _relative(found["change"], base)))
    rows += [(f"cosine of {data.names[a]} and {data.names[b]}", shown(c)) for (a, b), c in found["cosines"].items()]
    if onto:
        rows.append(("sign conflicts", _percent(found["sign_conflict"])))
    rows += [(f"kept of {data.names[model]}", _percent(share)) for model, share in found.get("kept", {}).items()]
    if onto:
        rows.append(("survival of rounding", _percent(found["survival"])))
    return [*rows, ("norm ratio", shown(found["norm_ratio"])), ("numbers not finite", f"{found['nonfinite']:,}")]


def _percent(share: float | None) -> str:
    return "unknown" if share is None or not math.isfinite(share) else f"{share:.1%}"


def _relative(length: float | None, base: float | None) -> str:
    return shown(length) if length is None or not base else f"{shown(length)} ({length / base:.2%} of the base)"


def findings(data: ReportData) -> list[Finding]:
    """What a person should know, the worst first; one that says so if there is nothing."""
    found = [Finding("warning", text) for text in data.warnings]
    found += [*_of_statistics(data), *_of_routing(data)]
    found += [Finding("look", text) for text in data.gaps]
    found.sort(key=lambda finding: finding.level != "warning")
    if not found:
        done = "all figures are in their usual range" if data.statistics else "no warnings"
        found = [Finding("good", f"Nothing to worry about: {done}.")]
    return found


def _of_statistics(data: ReportData) -> Iterator[Finding]:
    if not data.statistics:
        return
    tensors = data.statistics.tensors
    broken = [name for name, f in tensors.items() if f["nonfinite"]]
    if broken:
        yield Finding("warning", f"{_tensors(len(broken))} with numbers that are not finite: {some_of(broken)}.")
    lost, worst = _beyond(tensors, lambda f: f.get("survival"), lambda x: x < LEAST_SURVIVAL)
    if lost:
        yield Finding("warning", f"Rounding ate more than a tenth of the change of {_tensors(lost)} ({worst[0]} keeps "
                      f"{worst[1]:.0%}); 'rounding: stochastic' in the recipe keeps it on average.")  # fmt: skip
    least, most = _RATIO
    odd, worst = _beyond(tensors, lambda f: f.get("norm_ratio"), lambda x: not least <= x <= most, around=1.0)
    if odd:
        yield Finding("look", f"The norm ratio is far from 1 in {_tensors(odd)} (most in {worst[0]}: {worst[1]:.3g}): "
                      f"the result is much longer or shorter there than the models.")  # fmt: skip
    total = pooled(list(tensors.values())) if tensors else {}
    alike = [(a, b, c) for (a, b), c in total.get("cosines", {}).items() if c is not None and c > _ALIKE]
    for a, b, cosine in alike if "change" in total else ():
        yield Finding("look", f"{data.names[a]} and {data.names[b]} learned nearly the same (cosine {cosine:.2f}): "
                      f"adding both at full weight overshoots.")  # fmt: skip
    opposed = [(a, b, c) for (a, b), c in total.get("cosines", {}).items() if c is not None and c < _OPPOSED]
    for a, b, cosine in opposed if "change" in total else ():
        yield Finding("look", f"{data.names[a]} and {data.names[b]} pull in opposite directions (cosine {cosine:.2f}): "
                      f"added, they cancel each other; 'ties' lets the stronger side win.")  # fmt: skip
    if data.statistics.unknown:
        yield Finding(
            "look", f"No figures of {_tensors(len(data.statistics.unknown))}: a run with --no-stats made them."
        )


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' * (count != 1)}"


def _beyond(
    tensors: Mapping[str, Mapping[str, Any]],
    get: Callable[[Mapping[str, Any]], float | None],
    is_odd: Callable[[float], bool],
    around: float = LEAST_SURVIVAL,
) -> tuple[int, tuple[str, float]]:
    """How many tensors have an odd figure, and the one that is furthest from ``around``."""
    values: Iterable[tuple[str, float | None]] = ((name, get(f)) for name, f in tensors.items())
    odd = [(name, x) for name, x in values if x is not None and math.isfinite(x) and is_odd(x)]
    return len(odd), max(odd, key=lambda pair: abs(pair[1] - around), default=("", 0.0))


def _of_routing(data: ReportData) -> Iterator[Finding]:
    report = data.routing
    if report is None:
        return
    chance = 1 / max(1, len(report.experts))
    if report.accuracy is not None and report.accuracy < 1.5 * chance < 1:
        yield Finding("warning", f"Tokens hardly find their expert: {report.accuracy:.0%}, by chance {chance:.0%}.")
    yield from (Finding("look", f"{text[:1].upper()}{text[1:]}.") for text in report.remarks())
