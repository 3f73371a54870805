"""``mergekit completion``: what makes a shell complete commands, options, methods and paths."""

from __future__ import annotations

import click


@click.command("completion", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), required=False)
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the completion script for SHELL: bash, zsh or fish. Without one: how to use it.

    \b
    bash: eval "$(mergekit completion bash)"  # in ~/.bashrc
    zsh:  eval "$(mergekit completion zsh)"  # in ~/.zshrc
    fish: mergekit completion fish > ~/.config/fish/completions/mergekit.fish
    """
    if shell is None:
        click.echo(ctx.get_help())
        return
    from click.shell_completion import get_completion_class

    from mergekit.cli.main import mergekit

    found = get_completion_class(shell)
    assert found is not None, "click knows these shells"
    complete = found(mergekit, {}, "mergekit", "_MERGEKIT_COMPLETE")
    click.echo(complete.source_template % complete.source_vars())
