"""Help for commands with the options of a merge: in sections, and what changes nothing in a list of its own."""

from __future__ import annotations

import click

from mergekit.options import OPTIONS, Option

__all__ = ["MergeCommand"]


class MergeCommand(click.Command):
    """A command whose options are those of the table in ``mergekit.options``, and a few of its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then one section for each of the table's."""
        fields = {option.field for option in OPTIONS}
        own = [p.get_help_record(ctx) for p in self.get_params(ctx) if _is_own(p, fields)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in own if record])
        for title in dict.fromkeys(option.section for option in OPTIONS if not option.unused):
            with formatter.section(title):
                formatter.write_dl([(_flag(o), _text(o)) for o in OPTIONS if o.section == title and not o.unused])
        with formatter.section("Accepted for the sake of old commands, without effect"):
            formatter.write_dl([(_flag(o), f"{o.unused[0].upper()}{o.unused[1:]}.") for o in OPTIONS if o.unused])
        formatter.write_paragraph()
        formatter.write_text("Every switch --x has an opposite, --no-x.")


_TAKES = {"out_shard_size": "SIZE", "transformers_cache": "FOLDER", "lora_merge_cache": "FOLDER", "method_file": "FILE"}


def _is_own(parameter: click.Parameter, fields: set[str]) -> bool:
    return isinstance(parameter, click.Option) and parameter.name not in fields


def _flag(option: Option) -> str:
    """The form that changes something: the switch that is off by default; with what an option takes."""
    if option.kind is bool:
        on, off = option.flags[-1].split("/")
        return off if option.default and not option.unused else on
    names = ", ".join(option.flags)
    if option.kind == "count":
        return names
    return f"{names} {_TAKES.get(option.field, 'N' if option.kind is int else 'NAME')}"


def _text(option: Option) -> str:
    if option.kind is bool and option.default:
        return f"Don't {option.help[0].lower()}{option.help[1:]}"
    shown = option.default not in (None, ()) and option.kind not in (bool, "count")
    return f"{option.help.removesuffix('.')} [{option.default}]." if shown else option.help
