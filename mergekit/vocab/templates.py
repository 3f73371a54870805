"""Chat templates: those that come with mergekit, those of models, and whether one works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.checkpoint import read_json

__all__ = [
    "BUILT_IN",
    "JINJA",
    "built_in",
    "chat_template",
    "special_strings",
    "syntax_fault",
    "template_fault",
    "template_text",
]

_HERE = Path(__file__).parent
BUILT_IN = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""The names of the templates that come with mergekit."""
_SPECIAL = re.compile(r"[a-z_]+_token")
JINJA = r"\{[{%]"
"""What the text of a template holds, and no name."""
_MOST_SECONDS = 20


def built_in(name: str) -> str:
    """The text of a template that comes with mergekit."""
    return (_HERE / "chat" / f"{name}.jinja").read_text(encoding="utf-8")


def template_text(value: str) -> str | None:
    """The template that a recipe's ``chat_template`` means: by name, or as it is; None if it is neither."""
    if value in BUILT_IN:
        return built_in(value)
    return value if re.search(JINJA, value) else None


def chat_template(folder: Path) -> str | None:
    """The chat template of the tokenizer in ``folder``, of several the default one; None if it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").strip()
    path = folder / "tokenizer_config.json"
    value = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = entries[0].get("template") if entries else None
    return value.strip() if isinstance(value, str) else None


def special_strings(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names: ``{"bos_token": "<s>", ...}``."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if _SPECIAL.fullmatch(key) and isinstance(text, str):
            found[key] = text
    return found


def syntax_fault(text: str) -> str | None:
    """What is wrong with the syntax of a chat template; None if nothing is. Nothing of it is run."""
    import jinja2

    from mergekit.vocab.render import environment

    try:
        text.encode("utf-8")
        environment().parse(text)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {' '.join(str(error.message).split())}"
    except (RecursionError, ValueError, OverflowError, jinja2.TemplateError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return None


def template_fault(text: str, tokens: Mapping[str, str]) -> str | None:
    """What is wrong with a chat template: it has a fault of syntax, or takes no conversation at all.

    It is rendered in a process of its own, with bounded memory and time, since it may be a stranger's.
    """
    fault = syntax_fault(text)
    if fault:
        return fault
    try:
        done = subprocess.run(
            [sys.executable, str(_HERE / "render.py")],
            input=json.dumps({"template": text, "tokens": dict(tokens)}),
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return "it takes more than a few seconds to render"
    except ValueError:
        return "it takes too much memory or time to render"
    fault = answer.get("fault")
    return None if fault is None else str(fault)
