"""``mergekit push``: publish a model on the hub."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from mergekit.cli.boundary import can_ask, plain, say
from mergekit.cli.progress import Meter, progress
from mergekit.cli.show import size
from mergekit.errors import UsageError, some_of

if TYPE_CHECKING:
    from mergekit.api.push import Upload


@click.command("push", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("folder", type=click.Path())
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make the repository private; an existing public one is refused.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; it is made if it is not there.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--no-verify", is_flag=True, help="Don't check the model first.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask, also where the recipe names folders of this machine.")
@click.option("--quiet", is_flag=True, help="Print the address only.")
def push(
    folder: str,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    no_verify: bool,
    yes: bool,
    quiet: bool,
) -> None:
    """Upload the model in FOLDER to the hub as REPOSITORY (org/name), in one commit.

    The model is checked first. Only files that are part of it go up; what else is in the folder stays. The token is
    that of `hf auth login`, or HF_TOKEN.
    """
    from mergekit.api.push import push_model

    with ExitStack() as screen:
        meter = Meter(0, "")

        def stage(text: str, nbytes: int) -> None:
            nonlocal meter
            screen.close()  # the bar of the check goes before the library draws those of the upload
            if not quiet:
                say(text)
            meter = screen.enter_context(progress(nbytes, shown=nbytes > 0 and not quiet, what="checking"))

        address = push_model(
            folder,
            repository,
            private=private,
            revision=revision,
            message=message,
            verify=not no_verify,
            quiet=quiet,
            agree=lambda upload: _agree(upload, yes, quiet),
            stage=stage,
            advance=lambda nbytes: meter(nbytes),
        )
    if address is None:
        say("nothing was sent")
    else:
        click.echo(plain(address))


def _agree(upload: Upload, yes: bool, quiet: bool) -> bool:
    """Say what goes up, and ask where there is somebody to ask."""
    if not quiet:
        for name, nbytes in upload.files:
            say(f"  {name}  {size(nbytes)}")
        say(f"{len(upload.files)} files, {size(upload.nbytes)}, to {upload.repo_id}")
        if upload.left:
            say(f"note: no part of the model, so it stays here: {some_of(upload.left)}")
    if upload.paths and not yes:
        text = f"the recipe names folders of this machine, for everyone to read: {some_of(upload.paths)}"
        if not can_ask():
            raise UsageError(f"{text}; --yes publishes it all the same")
        say(f"warning: {text}")
    return yes or not can_ask() or click.confirm("Upload?", err=True)
