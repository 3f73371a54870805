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
        own = [p.get_help_record(ctx) for p in self.get_params(ctx) if p.name not in fields]
        with formatter.section("Options"):
            formatter.write_dl([record for record in own if record])
        sections: dict[str, list[Option]] = {}
        for option in OPTIONS:
            sections.setdefault(option.section if not option.unused else "Accepted, change nothing", []).append(option)
        unused = sections.pop("Accepted, change nothing", [])
        for title, options in sections.items():
            with formatter.section(title):
                formatter.write_dl([(_flag(option), _text(option)) for option in options])
        with formatter.section("Accepted for old commands, without effect"):
            formatter.write_dl([(_flag(option), f"{option.unused}.".capitalize()) for option in unused])
        formatter.write_paragraph()
        formatter.write_text("Every switch --x has an opposite, --no-x.")


def _flag(option: Option) -> str:
    """The form that changes something: the switch that is off by default, with what it takes otherwise."""
    switch = option.flags[-1].split("/")
    if option.kind is bool:
        return switch[1] if option.default else switch[0]
    names = ", ".join(option.flags)
    return names if option.kind == "count" else f"{names} {'N' if option.kind is int else 'TEXT'}"


def _text(option: Option) -> str:
    text = option.help if not (option.kind is bool and option.default) else f"Don't {option.help[0].lower()}{option.help[1:]}"
    shown = option.default is not None and option.kind not in (bool, "count")
    return f"{text.removesuffix('.')} [{option.default}]." if shown else text
