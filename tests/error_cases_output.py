"""Errors of options, and of the folder that the result goes to."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from error_cases_build import MERGE, PLAN, Case, Group, link, several, text

__all__ = ["GROUPS"]


def _nothing(folder: Path) -> None:
    """The situation that every case starts with."""


def _unfinished(folder: Path) -> None:
    """What a merge leaves that was killed, and a recipe that has changed since."""
    from command import mergekit

    with patch("mergekit.output.staging.Staging.publish", side_effect=KeyboardInterrupt):
        assert mergekit("merge", "recipe.yml", "out").code == 130
    path = folder / "recipe.yml"
    path.write_text(path.read_text() + "dtype: float32\n")


def _edited(folder: Path) -> None:
    """A model with a full report, and a recipe that has changed since."""
    from command import mergekit

    assert mergekit("merge", "recipe.yml", "out", "--report").code == 0
    with (folder / "out/mergekit_config.yml").open("a") as stream:
        stream.write("# edited\n")


@contextmanager
def _locked() -> Iterator[None]:
    """Another process writes to ``out``."""
    import fcntl

    descriptor = os.open("out", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _small_disk() -> object:
    usage = namedtuple("usage", "total used free")
    return patch.object(shutil, "disk_usage", lambda path: usage(4000, 3000, 1000))


def _disk_error(number: int) -> object:
    return patch.object(os, "posix_fallocate", create=True, side_effect=OSError(number, os.strerror(number)))


OPTIONS = [
    Case(
        title="A number of threads is impossible",
        build=_nothing,
        command=f"{PLAN} -j 0",
        message="--num-threads 0: give at least 1",
        meaning="Without the option there is one thread for each processor.",
    ),
    Case(
        title="A seed is impossible",
        build=_nothing,
        command=f"{PLAN} --random-seed -1",
        message="--random-seed -1: give a whole number from 0 to 2^63 - 1",
        meaning="Give a number in that range, or leave the option out.",
    ),
    Case(
        title="A size can't be read",
        build=_nothing,
        command=f"{PLAN} --out-shard-size 5T",
        message="'5T' is not a size; write bytes, or a number with k, m or b: 500m, 5B",
        meaning="The size of a shard; 0 writes one file.",
    ),
    Case(
        title="The device does not exist",
        build=_nothing,
        command=f"{PLAN} --device abacus",
        message="'abacus' is not a device; write cpu, cuda, cuda:0, mps or auto",
        meaning="`auto` takes an accelerator if there is one.",
    ),
    Case(
        title="The device is not there",
        build=_nothing,
        command=f"{PLAN} --device cuda",
        during=lambda: patch("torch.accelerator.current_accelerator", lambda *a, **k: None),
        message="there is no cuda device on this machine (torch finds none); use --device cpu",
        meaning="Leave the option out; merges are fast on the processor, too.",
    ),
    Case(
        title="Pickles are asked for",
        build=_nothing,
        command=f"{PLAN} --no-safe-serialization",
        message=(
            "--no-safe-serialization: only safetensors are written; if you need a pickle, load the result with "
            "safetensors.torch.load_file() and torch.save() it"
        ),
        meaning="Everything that loads models reads safetensors.",
    ),
    Case(
        title="The method to explain does not exist",
        build=_nothing,
        command="mergekit methods tiez",
        message="no merge method 'tiez'. Did you mean 'ties'?",
        meaning="`mergekit methods` lists all.",
    ),
]
FOLDERS = [
    Case(
        title="The output has no name",
        build=_nothing,
        command="mergekit merge recipe.yml ''",
        message="OUT_PATH is empty; give a folder for the output",
        meaning="A variable of the shell may be empty.",
    ),
    Case(
        title="The output is a file",
        build=_nothing,
        command="mergekit merge recipe.yml recipe.yml",
        message="recipe.yml is a file; give a folder for the output",
        meaning="The result is several files, in a folder that is made if it isn't there.",
    ),
    Case(
        title="The output holds a model",
        build=_nothing,
        command="mergekit merge recipe.yml models/a",
        message="models/a already holds weights (model.safetensors); choose another folder, or pass --overwrite",
        meaning="The option replaces the model that is there, once the new one is complete.",
    ),
    Case(
        title="The output is an input",
        build=_nothing,
        command="mergekit merge recipe.yml models/a --overwrite",
        message="models/a is also an input (models/a); choose another folder for the output",
        meaning="The input would be gone before it is read.",
    ),
    Case(
        title="A folder is in the way of a file",
        build=text("out/README.md/notes.txt", "mine"),
        command=MERGE,
        message="out/README.md is a folder, and a file of that name has to be written; move it away",
        meaning="Rename the folder, or choose another one for the output.",
    ),
    Case(
        title="The output folder can't be made",
        build=_nothing,
        command="mergekit merge recipe.yml recipe.yml/out",
        message="cannot make the folder recipe.yml/out: Not a directory",
        meaning="A part of the path is a file, or you may not write there.",
    ),
    Case(
        title="Another merge writes there",
        build=lambda folder: (folder / "out").mkdir(),
        command=MERGE,
        during=_locked,
        message="another merge is writing to out; wait for it, or choose another folder",
        meaning="Two processes at one folder would spoil each other's files.",
    ),
    Case(
        title="Work of another merge is there",
        build=_unfinished,
        command=MERGE,
        code=1,
        message=(
            "out/.mergekit-staging holds unfinished work of another merge: the recipe or its options changed; "
            "run the old command again to finish it, or pass --restart to throw it away"
        ),
        meaning="An interrupted merge continues only with the recipe, options and models that it began with.",
    ),
    Case(
        title="The folder for unfinished work is something else",
        build=several(text("out/notes.txt", "mine"), link("out/.mergekit-staging", "../models")),
        command=MERGE,
        message="out/.mergekit-staging is not a folder of ours; remove it",
        meaning="A link there could lead the files anywhere.",
    ),
    Case(
        title="A report without its library",
        build=_nothing,
        command=f"{MERGE} --report",
        during=lambda: patch("mergekit.output.report.charts.find_spec", return_value=None),
        message=(
            "a report needs altair and vl_convert for its charts; install them with: pip install 'mergekit[report]'"
        ),
        meaning="Said before anything is downloaded or read. The merge itself does not need them.",
    ),
    Case(
        title="A report on something else",
        build=lambda folder: (folder / "out").mkdir(),
        command="mergekit report out",
        message=(
            "out has neither merge_manifest.json nor merge_stats.json, which a report is made from: it was not merged "
            "by mergekit, or they were left out; `mergekit inspect out` shows what it is"
        ),
        meaning="A model that mergekit did not make, or whose files were not kept.",
    ),
    Case(
        title="A report would replace a fuller one",
        build=_edited,
        command="mergekit report out",
        message=(
            "out/merge_report.html knows more than a report that is made now: the recipe could not be planned again, "
            "so parameters and the origins of layers are not known: out/mergekit_config.yml is not the recipe that the "
            "model was made from: it changed since; run it where the recipe's paths lead to the models, or name "
            "another file with -o"
        ),
        meaning=(
            "Most often the command runs in another folder than the merge did, so that the models are not found. With "
            "`-o` a report is written of what is known."
        ),
    ),
    Case(
        title="The disk is too small",
        build=_nothing,
        command=MERGE,
        code=1,
        during=_small_disk,
        message="the output needs 4,248 bytes, but . has 1,000 free; free some space or choose another disk",
        meaning="Known before anything is written.",
    ),
    Case(
        title="The disk fills up",
        build=_nothing,
        command=MERGE,
        code=1,
        during=lambda: _disk_error(errno.ENOSPC),
        message="no space left for out; free some and run the same command again: it continues",
        meaning="Something else took the space while the merge ran.",
    ),
    Case(
        title="The disk fails",
        build=lambda folder: None,
        command=MERGE,
        code=1,
        during=lambda: patch(
            "mergekit.output.staging.write_at", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))
        ),
        message="cannot write to out: Input/output error",
        meaning="The system says why; look into its log.",
    ),
]
GROUPS = (
    Group("Options", "What stands on the command line.", OPTIONS),
    Group("The output folder", "It is looked at before a weight is read.", FOLDERS),
)
