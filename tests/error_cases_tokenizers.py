"""Errors of tokenizers: files that contradict themselves, vocabularies that can't be joined, tokens without a row."""

from __future__ import annotations

import json
from typing import Any

from error_cases_build import RECIPE, Build, Case, Group, model, recipe, several, tensors, text
from files import VOCAB, encode, llama

__all__ = ["GROUPS"]

WORDS = {f"w{i}": i for i in range(VOCAB)}
UNION = f"{RECIPE}tokenizer_source: union\n"
ADDED: dict[str, Any] = {"id": VOCAB, "content": "x", "special": True}
EMBEDDINGS = "model.embed_tokens.weight"


def _tokenizer(name: str, kind: str = "WordLevel", vocab: object = None, added: object = None, **more: Any) -> Build:
    """The tokenizer.json of a model."""
    inner = {"type": kind, "vocab": WORDS if vocab is None else vocab, **more}
    return text(f"models/{name}/tokenizer.json", json.dumps({"model": inner, "added_tokens": added or []}))


def _second(kind: str = "WordLevel", vocab: object = None, added: object = None, **more: Any) -> Build:
    """A union of two models, the second of which has a tokenizer of its own."""
    return several(recipe(UNION), _tokenizer("a"), _tokenizer("b", kind, vocab, added, **more))


def _tokens(section: str, *builds: Build) -> Build:
    """Models with the same tokenizer, but for ``builds``, and a recipe with a tokenizer section."""
    return several(recipe(f"{RECIPE}tokenizer: {section}\n"), _tokenizer("a"), _tokenizer("b"), *builds)


FILES = [
    Case(
        title="A model has no tokenizer",
        build=several(recipe(UNION), _tokenizer("a")),
        message="models/b has no tokenizer (no tokenizer.json in models/b), which its vocabulary needs",
        meaning="Download the model's tokenizer.json, too, or leave the tokenizer settings out.",
    ),
    Case(
        title="A model has only a slow tokenizer",
        build=several(recipe(UNION), _tokenizer("a"), text("models/b/tokenizer.model", "")),
        message=(
            "models/b has only a slow tokenizer (tokenizer.model); write its tokenizer.json once, with "
            "transformers: AutoTokenizer.from_pretrained('models/b').save_pretrained('models/b')"
        ),
        meaning="Vocabularies are read from tokenizer.json; transformers writes one from the older file.",
    ),
    Case(
        title="The model to compare is not there",
        build=lambda folder: None,
        command="mergekit tokenizer diff models/a ./nowhere",
        message="no folder './nowhere'; give the path of a model folder, or a hub name like org/model",
        meaning="Check the path, or the hub name.",
    ),
    Case(
        title="The tokenizer is of an unknown format",
        build=several(recipe(UNION), _tokenizer("a"), text("models/b/tokenizer.json", "{}")),
        code=1,
        message="models/b/tokenizer.json: no 'model'; this is no tokenizer, or one of an unknown format",
        meaning="Fetch the file again, or leave the tokenizer settings out.",
    ),
    Case(
        title="The tokenizer is of an unknown type",
        build=_second("Magic"),
        code=1,
        message="models/b/tokenizer.json: a tokenizer of type 'Magic' is not known here",
        meaning="BPE, Unigram, WordPiece and WordLevel are known.",
    ),
    Case(
        title="A vocabulary is no mapping",
        build=_second(vocab=[1]),
        code=1,
        message="models/b/tokenizer.json: 'vocab' does not map tokens to ids",
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="A vocabulary is no list of pieces",
        build=_second("Unigram"),
        code=1,
        message="models/b/tokenizer.json: 'vocab' is not a list of pieces and scores",
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="A prefix is no text",
        build=_second("WordPiece", continuing_subword_prefix=3),
        code=1,
        message="models/b/tokenizer.json: 'continuing_subword_prefix' is no text",
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="Merges are missing",
        build=_second("BPE"),
        code=1,
        message="models/b/tokenizer.json: 'merges' is not a list",
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="A merge has three tokens",
        build=_second("BPE", merges=["w1 w2 w3"]),
        code=1,
        message="models/b/tokenizer.json: 'w1 w2 w3' is not a merge of two tokens",
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="A merge is no text",
        build=_second("BPE", merges=[[1, 2]]),
        code=1,
        message="models/b/tokenizer.json: 'merges' holds something that is no text",
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="A merge makes no token",
        build=_second("BPE", merges=["w1 w2"]),
        code=1,
        message="models/b/tokenizer.json: the merge of 'w1' and 'w2' is not in the vocabulary",
        meaning="Vocabulary and merges are of two tokenizers: fetch the file again.",
    ),
    Case(
        title="Two tokens have one id",
        build=_second(vocab={**WORDS, "again": 0}),
        code=1,
        message="models/b/tokenizer.json: 'w0' and 'again' both have id 0",
        meaning="The file was edited by hand: fetch it again.",
    ),
    Case(
        title="An id is far beyond the others",
        build=_second(vocab={**WORDS, "far": (1 << 24) - 2}),
        code=1,
        message="models/b/tokenizer.json: 32 tokens, but one has id 16777214; its embeddings would be mostly empty",
        meaning="Give the token a free id next to the others.",
    ),
    Case(
        title="A token is no text",
        build=_second(vocab={**WORDS, "\ud800": VOCAB}),
        code=1,
        message=(
            "models/b/tokenizer.json: not valid JSON (it holds half of a surrogate pair); download it again, or mend it"
        ),
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="Added tokens are no list",
        build=_second(added="x"),
        code=1,
        message="models/b/tokenizer.json: 'added_tokens' is not a list",
        meaning="The file is damaged: fetch it again.",
    ),
    Case(
        title="An added token has no id",
        build=_second(added=[{"content": "x"}]),
        code=1,
        message="models/b/tokenizer.json: {'content': 'x'} is not an added token",
        meaning="The file was edited by hand: mend the entry.",
    ),
    Case(
        title="A setting of an added token is no switch",
        build=_second(added=[{**ADDED, "special": "yes"}]),
        code=1,
        message="models/b/tokenizer.json: a setting of the added token 'x' is not true or false",
        meaning="The file was edited by hand: write true or false.",
    ),
    Case(
        title="An added token has two ids",
        build=_second(added=[ADDED, {**ADDED, "id": VOCAB + 1}]),
        code=1,
        message="models/b/tokenizer.json: the added token 'x' has two ids, 31 and 32",
        meaning="The file was edited by hand: remove one of the entries.",
    ),
    Case(
        title="An added token has another id in the vocabulary",
        build=_second(added=[{**ADDED, "content": "w0"}]),
        code=1,
        message="models/b/tokenizer.json: the added token 'w0' has id 31, but the vocabulary gives it 0",
        meaning="The file was edited by hand: make the ids the same.",
    ),
]
JOINING = [
    Case(
        title="The tokenizer source is no model",
        build=_tokens("{source: models/c}"),
        message=(
            "recipe.yml:7:13: 'models/c' is not a tokenizer source, nor a model that this recipe names so. Did "
            "you mean 'models/b'?"
        ),
        meaning="Write `union`, `base`, or a model as the recipe names it.",
    ),
    Case(
        title="Tokenizers have no union",
        build=_second("WordPiece", unk_token="w0"),
        message=(
            "recipe.yml:7:1: the tokenizers of models/a (WordLevel) and models/b (WordPiece) have no union: "
            "WordPiece joins only WordPiece; choose one of the two, for example 'tokenizer_source: models/a'"
        ),
        meaning="Text is split in ways that have nothing in common; keep the tokenizer of one model.",
    ),
    Case(
        title="A Unigram tokenizer has a hole",
        build=several(
            recipe(UNION),
            _tokenizer("a", "Unigram", [["w0", -1.0], ["w0", -1.0]], [{**ADDED, "id": 5}], unk_id=0),
            _tokenizer("b", "Unigram", [["w0", -1.0], ["w1", -1.0], ["w2", -2.0]], unk_id=0),
        ),
        message=(
            "recipe.yml:7:1: the tokenizer of models/a has no token with id 2, and one of type Unigram can't "
            "grow beyond a hole; choose another 'tokenizer_source'"
        ),
        meaning="In such a file the place of a piece is its id, so nothing can follow a gap.",
    ),
    Case(
        title="There are no embeddings to align",
        build=several(
            _tokens("{source: union}"),
            *(tensors({"w": encode("F32", llama(1)["model.norm.weight"][1] * 0 + 1)}, name) for name in "ab"),
        ),
        message=(
            "no embeddings were found that the tokenizer's ids could index; leave the tokenizer settings out "
            "to merge these models tensor by tensor"
        ),
        meaning="These are no language models, or their embeddings have a name that isn't known.",
    ),
    Case(
        title="Embeddings differ by more than the vocabulary",
        build=several(
            _tokens("{source: union}"),
            model("b", {EMBEDDINGS: encode("F32", llama(1)["lm_head.weight"][1][:, :5].astype("<f4"))}),
        ),
        message=(
            "cannot merge model.embed_tokens.weight: shapes [31, 7] and [31, 5] differ by more than the "
            "vocabulary; merge models that were fine-tuned from the same base"
        ),
        meaning="The models are of different sizes, so their embeddings can't be averaged.",
    ),
    Case(
        title="Embeddings of three models are to be interpolated",
        build=several(
            _tokens("{source: union}"),
            recipe(
                f"{RECIPE}  - {{model: models/c, parameters: {{weight: 1}}}}\n"
                "tokenizer_source: union\nparameters: {embed_slerp: true}\n"
            ),
            model("c"),
            _tokenizer("c"),
        ),
        message=(
            "recipe.yml:2:1: 'embed_slerp' interpolates between two models, but model.embed_tokens.weight is "
            "merged from 3"
        ),
        meaning="Leave `embed_slerp` out: the embeddings are then merged as everything else.",
    ),
]
TOKENS = [
    Case(
        title="A token is empty",
        build=_tokens("{tokens: {'': {source: models/a}}}"),
        message="recipe.yml:7:22: a token has at least one character",
        meaning="Write the token as its text, in quotes.",
    ),
    Case(
        title="A token needs a source",
        build=_tokens("{tokens: {new: {}}}"),
        message="recipe.yml:7:22: token 'new' needs a 'source': not every model has it",
        meaning="Say what its embeddings are made of: a model that has it, another token, or zeros.",
    ),
    Case(
        title="A token's source does not have it",
        build=_tokens("{tokens: {new: {source: models/a}}}"),
        message="recipe.yml:7:28: models/a has no token 'new'; name one that it has, with 'kind: model_token'",
        meaning="Take the row of another token: `source: {kind: model_token, model: models/a, token: w1}`.",
    ),
    Case(
        title="A token's source is no model",
        build=_tokens("{tokens: {new: {source: models/c}}}"),
        message="recipe.yml:7:28: 'models/c' is not a model that this recipe names so. Did you mean 'models/b'?",
        meaning="Name a model as the recipe does.",
    ),
    Case(
        title="A kind of source does not exist",
        build=_tokens("{tokens: {new: {source: {kind: zeros}}}}"),
        message="recipe.yml:7:37: 'zeros' is no kind of token source. Did you mean 'zero'?",
        meaning="`zero` gives zeros, `model_token` the row of a token.",
    ),
    Case(
        title="A key of a source does not exist",
        build=_tokens("{tokens: {new: {source: {kind: model_token, model: models/a, tokn: w1}}}}"),
        message="recipe.yml:7:73: there is no 'tokn' here. Did you mean 'token'?",
        meaning="Write the key that is meant, or take it out.",
    ),
    Case(
        title="A source names no model",
        build=_tokens("{tokens: {new: {source: {kind: model_token, token: w1}}}}"),
        message="recipe.yml:7:28: a source of kind 'model_token' needs a 'model'",
        meaning="Add `model`, as the recipe names it.",
    ),
    Case(
        title="A source names no token",
        build=_tokens("{tokens: {new: {source: {kind: model_token, model: models/a}}}}"),
        message="recipe.yml:7:28: give exactly one of 'token' and 'token_id'",
        meaning="Give the token's text or its id.",
    ),
    Case(
        title="A source names an unknown token",
        build=_tokens("{tokens: {new: {source: {kind: model_token, model: models/a, token: w99}}}}"),
        message="recipe.yml:7:73: models/a has no token 'w99'",
        meaning="`mergekit tokenizer diff` shows which tokens models have.",
    ),
    Case(
        title="A source names an id without embeddings",
        build=_tokens("{tokens: {new: {source: {kind: model_token, model: models/a, token_id: 99}}}}"),
        message="recipe.yml:7:73: token_id 99 is outside the embeddings of models/a, which have 31 rows",
        meaning="Ids count from 0 to one below the number of rows.",
    ),
    Case(
        title="A model without the tensor is to give a row",
        build=several(
            recipe(
                f"{RECIPE}  - {{model: models/c, parameters: {{weight: 1}}}}\n"
                "tokenizer: {tokens: {w1: {source: models/b, force: true}}}\n"
            ),
            *map(_tokenizer, "ab"),
            model("c"),
            _tokenizer("c"),
            tensors({name: array for name, array in llama(1).items() if name != EMBEDDINGS}),
        ),
        message="token 'w1': models/b has no part in model.embed_tokens.weight, so it can't give its row",
        meaning="Name a model that has embeddings and head.",
    ),
    Case(
        title="A model without the row is to give it",
        build=_tokens(
            "{tokens: {w30: {source: models/b, force: true}}}",
            model("b", {"lm_head.weight": encode("BF16", llama(1)["lm_head.weight"][1][:20].astype("<f4"))}),
        ),
        message="token 'w30': models/b has no row for it in lm_head.weight (20 rows)",
        meaning="The head of that model has fewer rows than its vocabulary; name another model.",
    ),
]
TEMPLATES = [
    Case(
        title="A chat template does not exist",
        build=recipe(f"{RECIPE}chat_template: chatmll\n"),
        message=(
            "recipe.yml:7:1: 'chatmll' is no chat template: give 'auto', one of alpaca, chatml, exaone, "
            "llama3, mistral, or a jinja text"
        ),
        meaning="Jinja texts are recognised by `{{` or `{%`.",
    ),
    Case(
        title="A chat template can't be used",
        build=recipe(f'{RECIPE}chat_template: "{{% for m in messages %}}"\n'),
        message=(
            "recipe.yml:7:1: the chat template can't be used: line 1: Unexpected end of template. Jinja was "
            "looking for the following tags: 'endfor' or 'else'. The innermost block that needs to be closed "
            "is 'for'."
        ),
        meaning="Mend the template; here the loop has no end.",
    ),
]
GROUPS = (
    Group("Tokenizer files", "A recipe that brings vocabularies together reads each model's tokenizer.json.", FILES),
    Group("Joining vocabularies", "What `tokenizer_source` and `tokenizer` ask for.", JOINING),
    Group("Rows of tokens", "What `tokens` says of single tokens.", TOKENS),
    Group("Chat templates", "What `chat_template` asks for.", TEMPLATES),
)
