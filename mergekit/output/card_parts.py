"""The parts that the cards of merges and of mixtures share: models, use, statistics, licences, how to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.families.config import auto_class, loading, needs_code
from mergekit.methods import get_method
from mergekit.methods.spec import DELTA_OPTIONS, Method
from mergekit.output.front_matter import hub_commit, hub_name
from mergekit.output.markdown import escape, fenced, link, table
from mergekit.planning.document import TOKENIZER_FILES
from mergekit.planning.expression import Apply
from mergekit.planning.input_cards import InputCards
from mergekit.planning.licences import terms
from mergekit.planning.plan import Plan

__all__ = [
    "TOKENIZER_FILES",
    "Command",
    "again",
    "citations",
    "licences",
    "model_name",
    "models",
    "others",
    "published",
    "statistics",
    "use",
]

_HUB = "https://huggingface.co"
_PAPER = re.compile(r"(?P<who>.+?) (?P<year>(?:19|20)\d\d), (?P<title>.+)")
_ARXIV = re.compile(r"https://arxiv\.org/abs/(\d{4}\.\d{4,5})")
_FOLDER = "path/to/this/folder"
_NAME_COMMENT = "this folder, or the model's name on the hub"


@dataclass(frozen=True, slots=True)
class Command:
    """What makes a model again: ``program``, and ``options`` that change what it writes.

    ``code`` are those of them by which code is run, so that ``mergekit reproduce`` needs them, too.
    """

    program: str
    options: Sequence[str] = ()
    code: Sequence[str] = ()


def model_name(plan: Plan, position: int) -> str:
    """A source as Markdown: its short name, with a link if it is on the hub, to the commit where that is known."""
    source = plan.sources[position]
    own, plus, more = source.short.partition("+")
    name, commit = hub_name(source), hub_commit(source)
    if name is None:
        return escape(source.short)
    address = f"{_HUB}/{name}{f'/tree/{commit}' if commit else ''}"
    return f"{link(own, address)}{plus}{escape(more)}"


def models(plan: Plan) -> str:
    """A table of the models: what each is to the merge, its parameters, its licence if any names one."""
    positions = [i for i, source in enumerate(plan.sources) if not (source.prepared or source.adapter)]
    settings = _settings(plan)
    names = list(dict.fromkeys(name for own in settings.values() for name in own))
    known = dict(plan.cards.cards)
    has_licences = any(card.licence for card in known.values())
    rows = []
    for position in positions:
        own, short = settings.get(position, {}), plan.sources[position].short.partition("+")[0]
        cells = [model_name(plan, position) + (" (base)" if position == plan.base else "")]
        licence = known[short].licence if short in known else None
        cells += [escape(str(licence or "none named"))] if has_licences else []
        rows.append([*cells, *(_span(own.get(name, ())) for name in names)])
    lines = [table(["model", *(["licence"] if has_licences else []), *names], rows, numbers=len(names))]
    adapters = [model_name(plan, i) for i, source in enumerate(plan.sources) if source.adapter]
    if adapters:
        lines.append(f"With the adapters {', '.join(adapters)}.")
    if any(hub_name(plan.sources[i]) is None for i in positions):
        lines.append("A name without a link is a folder of whoever made the merge.")
    return "\n\n".join(lines)


def others(plan: Plan) -> str:
    """The parameters that are not a model's own, where they are not the defaults: ``lambda 0.8, normalize false``."""
    method, found = get_method(plan.method), dict[str, dict[Any, None]]()
    for apply in _merged(plan, method):
        given = dict(apply.parameters)
        for parameter in method.params:
            is_default = given.get(parameter.argument) in (parameter.default, None)
            if parameter.scope == "once" and not parameter.name.startswith("_") and not is_default:
                found.setdefault(parameter.name, {})[given[parameter.argument]] = None
        for name in ("factor", "weighting", "svc"):
            if name in apply.settings:
                found.setdefault(name, {})[apply.settings[name]] = None
    return ", ".join(f"{name} {_span(tuple(values))}" for name, values in found.items())


def _merged(plan: Plan, method: Method) -> Iterable[Apply]:
    found = (output.expression for output in plan.outputs)
    return [e for e in found if isinstance(e, Apply) and e.method == method.name]


def _settings(plan: Plan) -> dict[int, dict[str, tuple[Any, ...]]]:
    """Each model's own parameters over all tensors: by position and name, each value once."""
    method, found = get_method(plan.method), dict[int, dict[str, dict[Any, None]]]()
    for apply in _merged(plan, method):
        given = dict(apply.parameters)
        for parameter in method.params:
            if parameter.scope == "once" or parameter.name.startswith("_") or parameter.argument not in given:
                continue
            owners = apply.models[1:] if parameter.scope == "each" and apply.has_base else apply.models
            for model, value in zip(owners, given[parameter.argument], strict=False):
                found.setdefault(model, {}).setdefault(parameter.name, {})[value] = None
    return {model: {name: tuple(values) for name, values in own.items()} for model, own in found.items()}


def _span(values: Sequence[Any]) -> str:
    """A value, a few values, or the range of many."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(values) > 3 and len(numbers) == len(values):
        return f"{min(numbers):.4g} to {max(numbers):.4g}"
    words = (
        str(v).lower() if isinstance(v, bool) else f"{v:.4g}" if isinstance(v, float) else escape(str(v))
        for v in values
    )
    return ", ".join(words)


def use(plan: Plan, title: str) -> str:
    """Code that loads the model with transformers, and lets it go on with a text where it is one for that."""
    config = json.loads(plan.config) if plan.config else {}
    auto, texts = auto_class(config), _tokenizer_texts(plan)
    trust = ", trust_remote_code=True" if needs_code(config) or '"auto_map":' in texts.get(_SETTINGS, "") else ""
    has_tokenizer = not TOKENIZER_FILES.isdisjoint([*(name for _, name in plan.files), *dict(plan.texts)])
    lines = [
        f"from transformers import {auto}{', AutoTokenizer' if has_tokenizer else ''}",
        "",
        f"name = {json.dumps(title, ensure_ascii=False)}  # {_NAME_COMMENT}",
        f"model = {loading(config, 'name')}",
    ]
    if has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained(name{trust})")
    if has_tokenizer and auto == "AutoModelForCausalLM":
        lines += ["", *(_CHAT if _has_template(texts) else _PROMPT), _GENERATE]
    return fenced("\n".join(lines), "python")


_SETTINGS = "tokenizer_config.json"
_TEMPLATES = (_SETTINGS, "chat_template.jinja", "chat_template.json")
_CHAT = (
    'messages = [{"role": "user", "content": "Hello!"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    ")",
)
_PROMPT = ('inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)',)
_GENERATE = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))"


def _tokenizer_texts(plan: Plan) -> dict[str, str]:
    """The settings and templates of the tokenizer that comes along, by the names of their files."""
    texts = {name: text for name, text in plan.texts if name in _TEMPLATES}
    for source, name in plan.files:
        if name in _TEMPLATES:
            path = Path(plan.sources[source].folder) / name
            texts.setdefault(name, path.read_text("utf-8", "replace") if path.is_file() else "")
    return texts


def _has_template(texts: Mapping[str, str]) -> bool:
    return '"chat_template":' in texts.get(_SETTINGS, "") or any(name != _SETTINGS for name in texts)


def published(card: str, name: str) -> str:
    """A card with its code naming the model as the hub does, if nobody has changed that line."""
    return re.sub(rf'^name = ".*"  # {_NAME_COMMENT}$', lambda _: f'name = "{name}"', card, count=1, flags=re.M)


def statistics(summary: Mapping[str, Any] | None, plan: Plan) -> str:
    """The figures of the whole merge as a table and in words; nothing where the models were not merged onto a base."""
    deltas: Mapping[str, float | None] = (summary or {}).get("deltas") or {}
    if not summary or not deltas:
        return ""
    names = list(deltas)
    cosines = summary["cosines"]

    def cosine(a: str, b: str) -> str:
        return "" if a == b else _figure(cosines.get(f"{a}, {b}", cosines.get(f"{b}, {a}")), ".2f")

    columns = names if 1 < len(names) <= 6 else []
    head = ["", "length of the change", *(f"cosine with {escape(name)}" for name in columns)]
    rows = [[escape(a), _figure(deltas[a], ".4g"), *(cosine(a, b) for b in columns)] for a in names]
    rows.append(["**merged**", _figure(summary["change"], ".4g"), *("" for _ in columns)])
    return f"{table(head, rows, numbers=len(head) - 1)}\n\n{_reading(summary, plan)}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _reading(summary: Mapping[str, Any], plan: Plan) -> str:
    """The figures in a few plain sentences."""
    cosines = [value for value in summary["cosines"].values() if value is not None]
    words = []
    if cosines:
        low, high = min(cosines), max(cosines)
        how = (
            "in nearly unrelated directions"
            if high < 0.1
            else "much the same way"
            if low > 0.5
            else "partly the same way"
        )
        figures = f"cosine {low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"cosines {low:.2f} to {high:.2f}"
        words.append(f"The models changed the base {how} ({figures}).")
    if cosines and summary["sign_conflict"] is not None:
        words.append(
            f"Of the entries that more than one of them changed, they disagree on the sign of "
            f"{100 * summary['sign_conflict']:.0f} %."
        )
    dtype = next((o.dtype.name for o in plan.outputs if o.dtype.is_float), None)
    if dtype and summary["survival"] is not None:
        words.append(f"{100 * summary['survival']:.4g} % of the merged change is left after rounding to {dtype}.")
    return " ".join(words)


def licences(cards: InputCards) -> str:
    """What the inputs' cards say of their licences where they differ, or where their one licence asks for more."""
    common = cards.common
    if common is not None:
        asked = terms(common)
        address = f" ({link('its text', common.link)})" if common.link else ""
        return f"Each model names {escape(str(common))}{address}: {escape('; '.join(asked))}." if asked else ""
    if not cards.differ:
        return ""
    rows = [
        [
            escape(", ".join(names)),
            "none named"
            if licence is None
            else link(str(licence), licence.link)
            if licence.link
            else escape(str(licence)),
            escape("; ".join(terms(licence))) if licence else "",
        ]
        for licence, names in cards.licences.items()
    ]
    return (
        f"{table(['models', 'licence', 'known to ask'], rows)}\n\nThe models' licences differ. This is what their own "
        f"cards name; what counts are the licences themselves."
    )


def citations(plan: Plan) -> str:
    """Whom to cite for the methods in use: BibTeX where a paper's line can be taken apart."""
    used = [plan.method, *(o.expression.method for o in plan.outputs if isinstance(o.expression, Apply))]
    methods = [get_method(name) for name in dict.fromkeys(used)]
    papers = {m.paper: m for m in methods if m.paper}
    entries = [_bibtex(m) for m in papers.values()]
    settings = {name for o in plan.outputs if isinstance(o.expression, Apply) for name in o.expression.settings}
    options = [p for p in DELTA_OPTIONS if {"lines_alpha": "factor"}.get(p.name, p.name) in settings]
    parts = [fenced("\n\n".join(filter(None, entries)), "bibtex")] if any(entries) else []
    parts += [f"{m.paper}. <{m.url}>" for m, entry in zip(papers.values(), entries, strict=True) if not entry]
    return "\n\n".join([*parts, *(f"`{p.name}`: {p.help}." for p in options)])


def _bibtex(method: Method) -> str:
    found = _PAPER.fullmatch(method.paper or "")
    if found is None:
        return ""
    who = found["who"].removesuffix(" et al.")
    names = [f"{{{name}}}" if " " in name else name for name in who.split(" & ")]
    authors = " and ".join([*names, *(["others"] if who != found["who"] else [])])
    key = re.sub(r"\W", "", who.split(" ")[0]).lower() + found["year"]
    lines = [f"title = {{{{{found['title']}}}}}", f"author = {{{authors}}}", f"year = {{{found['year']}}}"]
    if arxiv := _ARXIV.fullmatch(method.url or ""):
        lines += [f"eprint = {{{arxiv[1]}}}", "archivePrefix = {arXiv}"]
    lines += [f"url = {{{method.url}}}"] if method.url else []
    return f"@misc{{{key},\n  " + ",\n  ".join(lines) + "\n}"


def again(plan: Plan, command: Command | None) -> str:
    """What this was made with, and the commands that make it again or check it."""
    command = command or Command("mergekit merge" if plan.mixture is None else "mergekit moe")
    lines = {
        " ".join([command.program, f"{_FOLDER}/{plan.recipe_name}", "again", *command.options]): "the same merge",
        " ".join(["mergekit reproduce", _FOLDER, *command.code]): "merge in memory, compare tensor by tensor",
        f"mergekit verify {_FOLDER}": "are these the files that were written?",
    }
    width = max(len(line) for line in lines if len(line) < 60)
    code = fenced("\n".join(f"{line:{width}}  # {comment}" for line, comment in lines.items()), "sh")
    place = "" if plan.device == "cpu" else f", on {plan.device}"
    words = [
        f"Made with mergekit {plan.version}, seed {plan.seed}{place}. The recipe above is `{plan.recipe_name}`; "
        f"`merge_manifest.json` holds the revision and digests of each input, and a checksum of each tensor."
    ]
    if "prompts_file" in plan.recipe:
        words.append(f"The files of its prompts have to lie beside `{plan.recipe_name}`.")
    if "--method-file" in command.options:
        words.append("The file of `--method-file` defines its method, and is not in this folder.")
    if any(hub_name(source) is None for source in plan.sources if not source.prepared):
        words.append("Run the commands in the folder where the merge was run: its models are looked for from there.")
    return f"{' '.join(words)}\n\n{code}"
