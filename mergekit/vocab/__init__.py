"""Tokenizers as data, and the embedding rows that their ids index.

Here: reading ``tokenizer.json``, uniting vocabularies, token maps, chat templates. Not here: tensors, recipes, files of
the output. To read another format of tokenizer, give it a function like ``read_vocabulary``.
"""

from mergekit.vocab.maps import token_map, untold
from mergekit.vocab.union import as_text, unite, with_tokens
from mergekit.vocab.vocabulary import Vocabulary, read_vocabulary, vocabulary_of

__all__ = [
    "Vocabulary",
    "as_text",
    "read_vocabulary",
    "token_map",
    "unite",
    "untold",
    "vocabulary_of",
    "with_tokens",
]
