"""Render a chat template as transformers does. Also a program, so that a stranger's template runs in a process of its
own, with little memory and time: ``python render.py`` reads JSON on stdin and answers with JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["environment", "render"]

_MEMORY = 512 << 20
_SECONDS = 5


class _RefusalError(Exception):
    """What a template says to a conversation that it does not take."""


def environment() -> Any:
    """The jinja2 environment in which chat templates are written.

    To ``parse`` with it runs nothing of a template; to compile computes what is constant, however large that is.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the model says; here it is only passed through."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 wants a plain set)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise _RefusalError(message)

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda form: "26 Jul 2024"
    return found


def render(text: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str], *, prompt: bool = False) -> str:
    """``messages`` in the form of the template ``text``. ``tokens``: ``bos_token`` and the like; ``prompt``: end with
    what makes the assistant speak."""
    template = environment().from_string(text)
    written: str = template.render(messages=messages, add_generation_prompt=prompt, **tokens)
    return written


def _conversations() -> list[list[dict[str, str]]]:
    """Conversations of growing demands: a template has to take one of them."""
    user, answer = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}
    system = {"role": "system", "content": "Be brief."}
    return [[system, user, answer, user], [user, answer, user], [user]]


def _main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    except (ImportError, ValueError, OSError):  # not on this system; the caller's own limit of time is left
        pass
    asked = json.load(sys.stdin)
    faults = []
    for messages in _conversations():
        try:
            written = render(asked["template"], messages, asked["tokens"], prompt=True)
            print(json.dumps({"text": written[:10_000]}))
            return
        except MemoryError:
            faults.append("it takes too much memory to render")
        except Exception as error:
            faults.append(f"{type(error).__name__.lstrip('_')}: {' '.join(str(error).split())}"[:300])
    print(json.dumps({"fault": faults[-1]}))


if __name__ == "__main__":
    _main()
