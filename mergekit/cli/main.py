"""The program ``mergekit``: verbs, each in a file of its own, imported when used."""

from __future__ import annotations

from importlib import import_module

import click

from mergekit.cli.boundary import EXIT_CODES, program
from mergekit.errors import nearest
from mergekit.version import __version__

_COMMANDS = {
    "new": "Write a recipe to start from, by questions or by flags.",
    "merge": "Merge the models of a recipe into a folder.",
    "moe": "Make a mixture of experts from dense models.",
    "lora": "Bake LoRA adapters into models.",
    "plan": "Print what merging a recipe would do.",
    "explain": "Show which value each parameter takes for which tensor, and why.",
    "inspect": "Show what a model is, from its headers.",
    "diff": "Show how models differ, before merging them.",
    "tokenizer": "Compare the tokenizers of models.",
    "methods": "List or explain the merge methods.",
    "verify": "Check a model: files, values, and the checksums of the merge that wrote it.",
    "reproduce": "Merge again what a model was made from, and compare.",
    "report": "Write a page about a merged model: recipe, parameters, figures.",
    "push": "Publish a model on the hub.",
    "warmup": "Compile the CPU kernels ahead of the first merge.",
    "completion": "Print what makes a shell complete commands, options and paths.",
}

_HOMES = {"reproduce": "verify"}
"""Files of commands that are not called like them."""


class _Verbs(click.Group):
    """Loads a command's file only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The click command of a verb."""
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"mergekit.cli.{_HOMES.get(cmd_name, cmd_name)}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that the arguments begin with; a misspelt one is answered with the nearest."""
        if not ctx.resilient_parsing and args[0] not in _COMMANDS:
            ctx.fail(f"No such command '{args[0]}'. {nearest(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit")
def mergekit() -> None:
    """Merge pretrained language models: a recipe becomes a plan, executed tensor by tensor."""


def main() -> None:
    """Run the program."""
    program(mergekit, "mergekit")


if __name__ == "__main__":
    main()
