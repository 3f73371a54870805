"""Load a written model as its users will: with transformers, quietly, from this machine only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.errors import RunError

__all__ = ["first_line", "load_model", "silent_transformers"]


def load_model(folder: Path, dtype: Any, *, trusted: bool = False) -> tuple[Any, dict[str, list[str]]]:
    """The model in ``folder``, and up to three names for each thing that is amiss: missing keys, unexpected ones.

    ``trusted``: code that lies in the folder may run. RunError if the model can't be loaded.
    """
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = read(
            folder, torch_dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=trusted
        )
    except Exception as error:  # transformers raises whatever its parts do
        raise RunError(f"{folder} does not load ({first_line(error)})") from None
    return model.eval(), {key: sorted(map(str, value))[:3] for key, value in info.items() if value}


def first_line(error: Exception) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.200}"


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars and no remarks of transformers on the screen."""
    import warnings

    import transformers

    logging: Any = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
