"""Commands: one file each, parse, call one public function, print. Results on stdout, everything else on stderr.

To add a verb, write ``cli/<verb>.py`` with a click command of that name and list it in ``main``.
"""
