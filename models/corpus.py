"""The text of the tiny models: three domains made from what every Python installation carries.

- `code`: standard library modules with their comments and docstrings taken out;
- `prose`: the English sentences of the `pydoc` topics and of those same comments and docstrings;
- `calc`: generated arithmetic, one problem a line.

Code and prose share no line, so an expert's gain on one domain is not a gain on the other in disguise.
A held-out document is chosen by the hash of its source (file, topic or problem), never by its content.

    python models/corpus.py        # writes models/heldout/
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evaluate import DOCUMENT_END, DOMAINS, HELD_OUT

SEED = 1
HELD_OUT_PART = 20  # one file or topic in this many is held out
HELD_OUT_PROBLEMS = 6  # one sum or difference in this many: there are about thirty thousand
NUM_QUESTIONS = 200

# Left out: tests and bundled wheels (not in every installation), tables of numbers (encodings), and files
# that describe the machine that Python was built on.
_SKIPPED = re.compile(
    r"(^|/)(site-packages|tests?|idle_test|encodings|pydoc_data|config-[^/]*|_bundled)/|_sysconfigdata"
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the file, topic or block it came from."""

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of one domain, split by source."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def is_held_out(source: str, *, part: int = HELD_OUT_PART) -> bool:
    """True for one source in `part`, the same ones on every machine.

    >>> is_held_out("argparse.py"), is_held_out("ast.py")
    (False, True)
    """
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % part == 0


def read_corpora() -> dict[str, Corpus]:
    """Every domain, with held-out paragraphs that also occur in training removed."""
    code, prose = read_standard_library()
    prose += read_topics()
    return {
        "code": split(code, separator="\n\n"),
        # Licence notices open hundreds of files: train on each once.
        "prose": split(prose, separator="\n", unique=True),
        "calc": generate_calc(),
    }


# Code and prose -------------------------------------------------------------------------------------------


def read_standard_library() -> tuple[list[Document], list[Document]]:
    """The modules of the running Python as (code without remarks, English sentences of the remarks)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    code, prose = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _SKIPPED.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            bare, remarks = separate_remarks(text)
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue  # lib2to3 and others keep a few files that are wrong on purpose
        if bare.isascii():
            code.append(Document(name, bare))
        prose.append(Document(name, english(remarks)))
    return code, prose


def read_topics() -> list[Document]:
    """The help topics of `pydoc`: chapters of the language reference as text."""
    from pydoc_data import topics

    return [Document(f"topic {name}", english([text])) for name, text in sorted(topics.topics.items())]


def separate_remarks(source: str) -> tuple[str, list[str]]:
    """Python source as (code alone, its docstrings and comment blocks in order).

    >>> separate_remarks('def f():\\n    "Say so."\\n    return 1  # because\\n')
    ('def f():\\n    return 1\\n', ['Say so.', 'because'])
    """
    lines = source.split("\n")  # as tokenize and ast count: splitlines() also ends a line at a form feed
    remarks: list[tuple[int, str]] = []
    emptied: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        first = node.body[0]
        remarks.append((first.lineno, docstring))
        if first.end_lineno is None or lines[first.lineno - 1][: first.col_offset].strip():
            continue  # `def f(): "text"` on one line: leave it
        for row in range(first.lineno - 1, first.end_lineno):
            emptied.add(row)
            lines[row] = ""
        if len(node.body) == 1:  # a body must not become empty
            emptied.discard(first.lineno - 1)
            lines[first.lineno - 1] = " " * first.col_offset + "pass"
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start
        before = lines[row - 1][:column].rstrip()
        lines[row - 1] = before
        if not before:
            emptied.add(row - 1)
        if row != last + 1 and block:
            remarks.append((last, "\n".join(block)))
            block = []
        block.append(token.string.lstrip("#!: "))
        last = row
    if block:
        remarks.append((last, "\n".join(block)))
    kept = "\n".join(line.rstrip() for row, line in enumerate(lines) if row not in emptied)
    kept = re.sub(r"\n{4,}", "\n\n\n", kept).strip("\n")
    return kept + "\n", [text for _, text in sorted(remarks)]


# A sentence of plain English: words and ordinary punctuation, no symbol that only code or markup has.
_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/-]*(?:\.[A-Za-z0-9 ,;:'\"()/-]+)*[.?!]")
_MIN_WORDS = 6


def english(texts: Iterable[str]) -> str:
    """The English sentences of `texts`, one paragraph a line.

    >>> english(["The value must be a number\\nor a string of digits.\\n\\n    x = f(y)\\n"])
    'The value must be a number or a string of digits.\\n'
    """
    paragraphs = []
    for text in texts:
        text = text.translate(str.maketrans("‘’“”–—", "''\"\"--"))
        text = re.sub(r"``?|\*\*?(?=\w)|(?<=\w)\*\*?|:\w+:(?=`)", "", text)
        for paragraph in re.split(r"\n[ \t]*\n|\n(?=[ \t]*[*-] )", text):
            joined = " ".join(paragraph.split())
            sentences = [s for s in re.split(r"(?<=[.?!])\s+(?=[A-Z\"(])", joined) if is_english(s)]
            if sentences:
                paragraphs.append(" ".join(sentences))
    return "".join(paragraph + "\n" for paragraph in dict.fromkeys(paragraphs))


def is_english(sentence: str) -> bool:
    """True for a whole sentence that is mostly letters and long enough to mean something."""
    words = sentence.split()
    plain = sum(word.strip(".,;:'\"()?!").isalpha() for word in words)
    return len(words) >= _MIN_WORDS and bool(_SENTENCE.fullmatch(sentence)) and plain >= 0.85 * len(words)


def split(documents: Iterable[Document], *, separator: str, unique: bool = False) -> Corpus:
    """Split by source, then remove held-out paragraphs that stand in training or twice in the held-out part.

    Paragraphs end at `separator`. `unique` removes repeats within training too.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[str] = set()
    for wanted_held_out, kept in ((False, train), (True, held_out)):
        for document in documents:
            if is_held_out(document.source) != wanted_held_out:
                continue
            paragraphs = []
            for paragraph in document.text.rstrip("\n").split(separator):
                key = " ".join(paragraph.split())
                # A short block (an import, a `pass`) is grammar, not memory: it may repeat.
                is_repeat = len(key) >= 40 and key in seen and (unique or wanted_held_out)
                seen.add(key)
                if not is_repeat:
                    paragraphs.append(paragraph)
            text = separator.join(paragraphs).strip("\n")
            if len(text) >= 200:
                kept.append(Document(document.source, text + "\n"))
    return Corpus(tuple(train), tuple(held_out))


# Arithmetic -----------------------------------------------------------------------------------------------


def generate_calc(num_train: int = 300_000, num_held_out: int = 2_600) -> Corpus:
    """Blocks of one to eight problems; held-out problems are disjoint from the training ones and distinct.

    >>> generate_calc(10, 3).held_out[0].text.count("=") > 0
    True
    """
    rng = random.Random(SEED)
    train: list[str] = []
    held_out: dict[str, None] = {}
    while len(train) < num_train or len(held_out) < num_held_out:
        problem, key = draw_problem(rng)
        if is_held_out(key, part=HELD_OUT_PROBLEMS):
            if len(held_out) < num_held_out:
                held_out[problem] = None
        elif len(train) < num_train:
            train.append(problem)
    return Corpus(tuple(_blocks(train, rng)), tuple(_blocks(list(held_out), rng)))


def draw_problem(rng: random.Random) -> tuple[str, str]:
    """A problem with its answer, and a key equal for `a+b` and `b+a` so that no twin is trained on."""
    if rng.random() < 0.65:  # one digit, seldom a second carry: what the base half learns
        a, b = rng.randrange(1, 1000), rng.randrange(1, 10)
    else:
        a, b = rng.randrange(1, 100), rng.randrange(1, 100)
    if rng.random() < 0.5:
        return f"{a}+{b}={a + b}", f"{min(a, b)}+{max(a, b)}"
    a, b = max(a, b), min(a, b)
    return f"{a}-{b}={a - b}", f"{a}-{b}"


def _blocks(problems: list[str], rng: random.Random) -> Iterator[Document]:
    start = 0
    while start < len(problems):
        size = rng.randint(1, 8)
        yield Document(f"calc {start}", "\n".join(problems[start : start + size]) + "\n")
        start += size


# Held-out files -------------------------------------------------------------------------------------------


def excerpts(documents: Iterable[Document], *, size: int) -> list[Document]:
    """From each document, up to `size` characters from a paragraph near its middle on: many files, little of each."""
    chosen = []
    for document in documents:
        text = document.text
        if len(text) > size:
            start = text.find("\n", (len(text) - size) // 2) + 1
            text = text[start : text.rfind("\n", start, start + size) + 1]
        chosen.append(Document(document.source, text))
    return chosen


def calc_questions(documents: Iterable[Document]) -> list[dict[str, str]]:
    """Distinct held-out problems; the answer is all digits after the equals sign."""
    problems = [line.split("=") for document in documents for line in document.text.split()]
    chosen = random.Random(SEED).sample(problems, NUM_QUESTIONS)
    return [{"prompt": prompt + "=", "answer": answer} for prompt, answer in chosen]


def cloze_questions(documents: Iterable[Document], *, word: str, window: int = 400) -> list[dict[str, str]]:
    """Complete the next word, where the prompt holds that word already.

    The prompt is the text before the word, from a line start at most `window` characters back. A word is a
    candidate when the regular expression `word` matches it, it is followed by a character that ends it, and it
    occurred in the prompt as a whole word. Each document gives the same number of candidates, drawn by seed.
    No model is asked.
    """
    rng = random.Random(SEED)
    pools = []
    for document in documents:
        pool = []
        for match in re.finditer(word, document.text):
            earliest = max(0, match.start() - window)
            prompt = document.text[earliest : match.start()]
            if earliest:
                prompt = prompt[prompt.find("\n") + 1 :] if "\n" in prompt else prompt[prompt.find(" ") + 1 :]
            answer = match.group()
            if len(prompt) >= window // 2 and re.search(rf"\b{re.escape(answer.strip())}\b", prompt):
                pool.append({"prompt": prompt, "answer": answer})
        rng.shuffle(pool)
        pools.append(pool)
    questions: dict[tuple[str, str], dict[str, str]] = {}
    for turn in range(max(map(len, pools))):
        for pool in pools:
            if turn < len(pool) and len(questions) < NUM_QUESTIONS:
                question = pool[turn]
                questions.setdefault((question["prompt"], question["answer"]), question)
    return list(questions.values())


# The leading space belongs to the answer, as it does to the token.
CODE_WORD = r"(?:(?<=\S) |(?<=[.(]))[A-Za-z](?:[A-Za-z_]*[A-Za-z])(?![\w])"
PROSE_WORD = r"(?<=\S) [A-Za-z]{2,}(?!\w)"


def write_held_out(corpora: dict[str, Corpus], folder: Path = HELD_OUT) -> None:
    """Write `{domain}.txt` and `{domain}_questions.jsonl` for each domain."""
    folder.mkdir(exist_ok=True)
    code = excerpts(corpora["code"].held_out, size=1800)
    prose = excerpts(corpora["prose"].held_out, size=5000)
    calc = list(corpora["calc"].held_out)
    questions = {
        "code": cloze_questions(code, word=CODE_WORD),
        "prose": cloze_questions(prose, word=PROSE_WORD),
        "calc": calc_questions(calc),
    }
    for domain, documents in zip(DOMAINS, (code, prose, calc), strict=True):
        text = DOCUMENT_END.join(document.text for document in documents)
        (folder / f"{domain}.txt").write_text(text, encoding="utf-8")
        rows = "".join(json.dumps(question) + "\n" for question in questions[domain])
        (folder / f"{domain}_questions.jsonl").write_text(rows, encoding="utf-8")


if __name__ == "__main__":
    corpora = read_corpora()
    write_held_out(corpora)
    for domain, corpus in corpora.items():
        for part, documents in (("train", corpus.train), ("held out", corpus.held_out)):
            print(
                f"{domain:6}{part:9}{sum(len(d.text) for d in documents):>10,} characters, {len(documents)} documents"
            )
