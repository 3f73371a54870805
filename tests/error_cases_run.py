"""Errors that show while tensors are merged, and in methods of the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from error_cases_build import (
    MERGE,
    PLAN,
    RECIPE,
    Build,
    Case,
    Group,
    adds,
    model,
    recipe,
    several,
    text,
    without,
)
from files import HIDDEN, encode

__all__ = ["GROUPS"]

METHOD = """from mergekit.methods import Span, method
@method("mine", form=Span("weights"), base="ignored", params=[])
def mine(gram):
    {body}
"""
OWN = f"{MERGE} --method-file mine.py"
CHECKED = f"{PLAN} --method-file mine.py"


def _spoilt(value: float, dtype: str = "") -> Build:
    """A model with one number of its last norm changed."""
    norm = np.ones(HIDDEN)
    norm[3] = value
    build = model("b", {"model.norm.weight": encode("F32", norm)}, code="F32")
    return several(build, adds(f"dtype: {dtype}")) if dtype else build


@contextmanager
def _after_planning(change: Build) -> Iterator[None]:
    """``change`` the inputs once the plan is made."""
    from mergekit import api

    planned = api.plan

    def plan(*args: Any, **more: Any) -> Any:
        made = planned(*args, **more)
        change(Path())
        return made

    with patch.object(api, "plan", plan):
        yield


def _touched(folder: Path) -> None:
    path = folder / "models/b/model.safetensors"
    os.utime(path, ns=(0, 0))


def _halved(folder: Path) -> None:
    path = folder / "models/b/model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def _method(body: str, words: str = "") -> Build:
    """A method of the user's own, and a recipe that merges by it."""
    return several(
        text("mine.py", METHOD.format(body=body)),
        recipe(RECIPE.replace("linear", "mine").replace("    parameters: {weight: 1}\n", "") + words),
    )


MERGING = [
    Case(
        title="A result holds NaN or infinity",
        build=_spoilt(np.nan),
        command=MERGE,
        code=1,
        message=(
            "tensor model.norm.weight came out with NaN or infinity; check its inputs, or pass "
            "--allow-nonfinite to go on"
        ),
        meaning="One of the models is broken: its own outputs are NaN, too.",
    ),
    Case(
        title="A result is too large for float16",
        build=_spoilt(1e9, "float16"),
        command=MERGE,
        code=1,
        message=(
            "tensor model.norm.weight came out with NaN or infinity (float16 overflows beyond 65504; try "
            "dtype: bfloat16); check its inputs, or pass --allow-nonfinite to go on"
        ),
        meaning="bfloat16 reaches as far as float32.",
    ),
    Case(
        title="Weights can't be made from lengths",
        build=several(
            _spoilt(np.nan),
            recipe(
                "merge_method: ties\nbase_model: models/a\nmodels: [{model: models/b}]\n"
                "parameters: {weight: 1, weighting: metagpt}\n"
            ),
        ),
        command=MERGE,
        code=1,
        message=(
            "tensor model.norm.weight of some model holds NaN or infinity, so 'metagpt' has no lengths to make "
            "weights from; mend the model, or give weights"
        ),
        meaning="One of the models is broken: its own outputs are NaN, too.",
    ),
    Case(
        title="An input changes during the merge",
        build=lambda folder: None,
        command=MERGE,
        code=1,
        during=lambda: _after_planning(_touched),
        message="models/b/model.safetensors changed while it was being merged; run the command again",
        meaning="Another program wrote to the model; the result would be a mix of two.",
    ),
    Case(
        title="An input is cut during the merge",
        build=lambda folder: None,
        command=MERGE,
        code=1,
        during=lambda: _after_planning(_halved),
        message=(
            "models/b/model.safetensors ends inside tensor 'model.embed_tokens.weight'; it was cut while we read it"
        ),
        meaning="Another program writes to the model: wait for it, or copy the model.",
    ),
    Case(
        title="An input goes away during the merge",
        build=lambda folder: None,
        command=MERGE,
        code=1,
        during=lambda: _after_planning(without("models/b/model.safetensors")),
        message="cannot open models/b/model.safetensors: No such file or directory",
        meaning="Bring the model back and run the command again.",
    ),
    Case(
        title="A tensor is too large for the memory",
        build=recipe(
            "merge_method: iso_c\nbase_model: models/a\nmodels: [{model: models/b}]\nparameters: {weight: 1}\n"
        ),
        command=MERGE,
        code=1,
        during=lambda: patch("mergekit.execute.whole_work.WholeWork.solve", side_effect=MemoryError),
        message="tensor model.embed_tokens.weight is too large for 'iso_c' in the memory that there is",
        meaning="Methods that decompose matrices hold whole tensors: use fewer threads (`-j 1`), or another method.",
    ),
    Case(
        title="The memory is full",
        build=lambda folder: None,
        code=1,
        during=lambda: patch("mergekit.api.plan", side_effect=MemoryError),
        message="out of memory; close other programs, or use fewer threads (-j 1)",
        meaning="A merge needs about 200 MB; something else takes the rest.",
    ),
]
METHODS = [
    Case(
        title="The method file is not there",
        build=lambda folder: None,
        command=CHECKED,
        message="there is no file mine.py to load methods from",
        meaning="Check the path; it is relative to the folder that the command runs in.",
    ),
    Case(
        title="The method file can't be run",
        build=text("mine.py", "import nothing_of_that_name\n"),
        command=CHECKED,
        message="cannot load methods from mine.py: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        meaning="Run it with Python to see where it stops.",
    ),
    Case(
        title="The method file has no method",
        build=text("mine.py", "pass\n"),
        command=CHECKED,
        message="mine.py registers no merge method; decorate a function with @method",
        meaning="[extending.md](extending.md) shows how a method is written.",
    ),
    Case(
        title="The method file has another ending",
        build=text("mine.txt", "pass\n"),
        command=f"{PLAN} --method-file mine.txt",
        message="cannot load methods from mine.txt: its name does not end in .py",
        meaning="Rename it.",
    ),
    Case(
        title="A name is taken",
        build=text("mine.py", METHOD.format(body="return gram").replace('"mine"', '"ties"')),
        command=CHECKED,
        message="cannot load methods from mine.py: a merge method called 'ties' is registered already",
        meaning="Give the method another name.",
    ),
    Case(
        title="A name is none",
        build=text("mine.py", METHOD.format(body="return gram").replace('"mine"', '" "')),
        command=CHECKED,
        message="cannot load methods from mine.py: ' ' is no name for a merge method",
        meaning="Give the method a name of some letters.",
    ),
    Case(
        title="A declaration contradicts itself",
        build=text("mine.py", METHOD.format(body="return gram").replace('"weights"', '"heights"')),
        command=CHECKED,
        message=(
            "cannot load methods from mine.py: the declaration of method 'mine': 'heights' is not a space; it "
            "has 'weights' and 'deltas'"
        ),
        meaning="Mend the declaration; [extending.md](extending.md) explains its parts.",
    ),
    Case(
        title="A function does not fit its declaration",
        build=text("mine.py", METHOD.format(body="return gram").replace("mine(gram)", "mine(gram, *, t)")),
        command=CHECKED,
        message=(
            "cannot load methods from mine.py: the function of method 'mine' does not fit its declaration: "
            "missing a required argument: 't'"
        ),
        meaning="Each parameter of the declaration is an argument of the function, and no other.",
    ),
    Case(
        title="A method fails",
        build=_method("return 1 / 0"),
        command=OWN,
        message=(
            "method 'mine' on tensor model.embed_tokens.weight: its function failed: ZeroDivisionError: "
            "division by zero"
        ),
        meaning="The function raised this; mend it.",
    ),
    Case(
        title="A method returns something else",
        build=_method("return [1.0]"),
        command=OWN,
        message=(
            "method 'mine' on tensor model.embed_tokens.weight: its function must return coefficients of shape "
            "[2], not list of shape [1]"
        ),
        meaning="The form of a method says what its function returns.",
    ),
]
GROUPS = (
    Group("While merging", "Finished tensors are kept: the same command continues, once the fault is mended.", MERGING),
    Group("Methods of your own", "Files that `--method-file` names.", METHODS),
)
