"""``mergekit tokenizer``: look at tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit.cli.boundary import plain

if TYPE_CHECKING:
    from mergekit.vocab.difference import Difference

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_SHOWN = 12


@click.group("tokenizer", context_settings=_SETTINGS)
def tokenizer() -> None:
    """Look at tokenizers."""


@tokenizer.command("diff", context_settings=_SETTINGS)
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything, token by token, as JSON.")
@click.option("--all", "show_all", is_flag=True, help=f"Print all tokens, not only the first {_SHOWN} of each kind.")
@click.option("--cache-dir", type=Path, metavar="PATH", help="Where files of hub models are kept.")
def diff(first: str, second: str, as_json: bool, show_all: bool, cache_dir: Path | None) -> None:
    """Print how the tokenizers of the models FIRST and SECOND differ. Both are folders or hub names."""
    from mergekit.api.tokenizers import tokenizer_difference

    found = tokenizer_difference(first, second, cache_dir=cache_dir)
    if as_json:
        click.echo(json.dumps(_record(found), indent=1))
        return
    click.echo("\n".join(plain(line) for line in difference_lines(found, None if show_all else _SHOWN)))


def difference_lines(found: Difference, most: int | None) -> list[str]:
    """A difference for people."""
    a, b = found.first, found.second
    width = max(len(a.name), len(b.name))
    lines = [f"{v.name:{width}}  {v.kind}, {len(v.ids):,} tokens, {len(v.added):,} of them added" for v in (a, b)]
    lines.append("")
    if found.is_none:
        return [*lines, "no difference: the same tokens under the same ids, the same special tokens and chat template"]
    lines.append(f"{found.shared:,} tokens in both, {len(found.moved):,} of them under different ids")
    lines += _listed([f"{t!r}  {i} -> {j}" for t, i, j in found.moved], most)
    for name, vocabulary, only in ((a.name, a, found.only_first), (b.name, b, found.only_second)):
        lines.append(f"{len(only):,} token{'s' * (len(only) != 1)} only in {name}")
        lines += _listed([f"{vocabulary.ids[token]:>7}  {token!r}{_kind(vocabulary, token)}" for token in only], most)
    if found.merges != (0, 0):
        lines.append(f"{found.merges[0]:,} merges only in {a.name}, {found.merges[1]:,} only in {b.name}")
    for name, mine, theirs in found.special:
        lines.append(f"{name}: {_shown(mine)} -> {_shown(theirs)}")
    if found.settings:
        lines.append(f"other settings: {', '.join(found.settings)}")
    lines.append(f"chat template: {_templates(found)}")
    return lines


def _listed(entries: list[str], most: int | None) -> list[str]:
    shown = entries if most is None else entries[:most]
    more = [f"    and {len(entries) - len(shown):,} more (--all)"] if len(shown) < len(entries) else []
    return [f"    {entry}" for entry in shown] + more


def _kind(vocabulary: Any, token: str) -> str:
    entry = vocabulary.added.get(token)
    return "" if entry is None else "  special" if entry.get("special") else "  added"


def _shown(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _templates(found: Difference) -> str:
    mine, theirs = found.templates
    if mine == theirs:
        return "none" if mine is None else "the same"
    if mine is None or theirs is None:
        return f"only {found.first.name if theirs is None else found.second.name} has one"
    return "different"


def _record(found: Difference) -> dict[str, Any]:
    return {
        "first": found.first.name,
        "second": found.second.name,
        "shared": found.shared,
        "only_first": {token: found.first.ids[token] for token in found.only_first},
        "only_second": {token: found.second.ids[token] for token in found.only_second},
        "moved": {token: [i, j] for token, i, j in found.moved},
        "merges": list(found.merges),
        "special": {name: [mine, theirs] for name, mine, theirs in found.special},
        "settings": list(found.settings),
        "chat_templates": list(found.templates),
    }
