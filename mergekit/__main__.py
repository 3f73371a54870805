"""``python -m mergekit`` is the program ``mergekit``."""

from mergekit.cli.main import main

main()
