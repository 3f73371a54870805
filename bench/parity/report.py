"""The table of a run."""

from __future__ import annotations

import argparse

from compare import Finding
from rules import RULES

SHOWN = 3
"""How many unexplained facts of one recipe are shown."""


def report(findings: list[Finding], shares: list[tuple[str, str, str, bool]], missing: list[str],
           options: argparse.Namespace) -> tuple[str, bool]:  # fmt: skip
    """The report as Markdown, and whether anything is unexplained."""
    lines = ["# Parity with arcee mergekit 0.1.5", ""]
    lines += [
        f"{len(findings)} random recipes (seed {options.seed}) on tiny Llamas, by `bench/parity/run.py`. The largest "
        "difference is a share of the largest term that is summed up, over all float32 elements that no rule covers.",
        "",
        "| method | recipes | both merge | both refuse | one refuses | tensors | largest difference | rules "
        "| unexplained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(f.case.method for f in findings):
        mine = [f for f in findings if f.case.method == method]
        used = sorted({rule for f in mine for rule in f.rules})
        lines.append(
            f"| {method} | {len(mine)} | {sum(not (f.ours or f.theirs) for f in mine)} "
            f"| {sum(bool(f.ours and f.theirs) for f in mine)} | {sum(f.is_one_sided for f in mine)} "
            f"| {sum(f.tensors for f in mine)} | {max(f.largest for f in mine):.1e} | {' '.join(used) or '-'} "
            f"| {sum(len(f.unexplained) for f in mine)} |"
        )
    lines += [f"\nNot registered here yet: {', '.join(missing)}." if missing else "", "## Rules", ""]
    for rule, text in RULES.items():
        where = [f.case.number for f in findings if rule in f.rules]
        lines.append(f"* **{rule}** {text}. Recipes: {', '.join(map(str, where)) or 'none of this run'}.")
    lines += ["", "## Refused by one tool", ""]
    for f in findings:
        if f.is_one_sided:
            who, text = ("ours", f.ours) if f.ours else ("0.1.5", f.theirs)
            rule = next(iter(f.rules), "?")
            lines.append(f"* {named(f)}, {rule}: {who} says {short(text)}")
    lines += ["", "## Refused by both", ""]
    for f in findings:
        if f.ours and f.theirs:
            told = f"ours says {short(f.ours)}, 0.1.5 {short(f.theirs)}"
            lines.append(f"* {named(f)}: {told}")
    lines += ["", "## config.json", ""]
    configs = [f"* {f.case.number}: {note}" for f in findings for note in f.notes if "config.json" in note]
    lines += configs or ["No field differs in meaning, in any recipe that both merge."]
    lines += ["", "## Random masks", "", "| recipe | tool | measured | as expected |", "|---|---|---|---|"]
    lines += [f"| {what} | {tool} | {text} | {'yes' if good else 'NO'} |" for what, tool, text, good in shares]
    bad = [
        f"* {named(f)}: {text}"
        for f in findings
        for text in (*f.unexplained[:SHOWN], *(["and more"] if len(f.unexplained) > SHOWN else []))
    ]
    lines += ["", "## Unexplained", "", *(bad or ["Nothing."]), ""]
    return "\n".join(lines), bool(bad) or not all(good for *_, good in shares)


def named(finding: Finding) -> str:
    """A recipe in a few words."""
    return f"{finding.case.number} {finding.case.method} ({finding.case.oddity or 'plain'})"


def short(text: str | None) -> str:
    """An error message without the folders of this run."""
    words = [word.rsplit("/", 1)[-1] if "/" in word else word for word in (text or "").split()]
    return f"`{' '.join(words)[:160]}`"
