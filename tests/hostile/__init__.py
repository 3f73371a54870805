"""Files and recipes made to harm, and what runs mergekit on them in a sandbox.

``stage`` puts a case among sound models, ``build`` makes the cases that are no committed files, ``sandbox`` runs the
program with limits and looks for broken promises, ``worker`` runs many cases in one process, ``mutate`` makes new
cases of old ones for ``tests/fuzz.py``. Nothing here executes a payload.
"""
