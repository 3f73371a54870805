"""Tokenizers as data, and the embedding rows that their ids index.

Here: reading ``tokenizer.json``, uniting vocabularies, token maps, chat templates. Not here: tensors, recipes, files of
the output. To read another format of tokenizer, give it a function like ``read_vocabulary``.
"""
