"""The live view of a run. Only a run in a terminal imports it: rich takes a tenth of a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from mergekit.cli.boundary import plain, say
from mergekit.cli.progress import Meter
from mergekit.cli.show import duration
from mergekit.cli.signals import leaving, whole

__all__ = ["View"]

_WIDEST = 80
"""Columns at most: what is not wider than a terminal survives its being made narrower."""


class View(Meter, RenderHook):
    """Three lines: a bar, the figures, the tensor or stage at hand. Lines too long for the terminal are cut."""

    def __init__(self, total: int, what: str) -> None:
        super().__init__(total, what)
        self._console = Console(stderr=True)
        self._widths: tuple[int, ...] = ()
        self._since = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """For so long. What is printed meanwhile appears above; the view goes at the end, however it comes."""
        live = Live(self, console=self._console, refresh_per_second=8, transient=True, redirect_stdout=False)

        def leave() -> None:
            self._console.pop_render_hook()
            live.stop()

        with whole():
            live.start(refresh=True)
            self._console.push_render_hook(self)
            leaving.append(leave)
        try:
            yield
        finally:
            with whole():
                if leave in leaving:
                    leaving.remove(leave)
                    leave()

    def tell(self, text: str) -> None:
        """A stage stands where tensors do, and its seconds where the speed does."""
        self.at_hand, self._since = text, time.monotonic()

    def opened(self, tensor: str) -> None:
        """The stages are over, for now."""
        self.at_hand, self._since = tensor, 0.0

    def figures(self) -> str:
        """Those of the bytes, and how long a stage has taken yet."""
        waited = f", waiting {duration(time.monotonic() - self._since)}" if self._since else ""
        return f"{super().figures()}{waited}"

    def compiling(self, forms: list[str]) -> None:
        """Stays above, because it says why the first run is slow."""
        say(self.about_kernels(forms))
        self.stage("compiling kernels")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The three lines."""
        width = min(options.max_width, _WIDEST)
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.width = width
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_row(self.what, ProgressBar(total=max(self.total, 1), completed=self.done), f"{self.share:4.0%}")
        texts = [Text(f"  {self.figures()}"), Text(f"  {plain(self.at_hand)}", style="dim")]
        for text in texts:
            text.truncate(width, overflow="ellipsis")
        self._widths = (width, *(text.cell_len for text in texts))
        yield bar
        yield from texts

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Clear the rows that a terminal has made of our lines when it became narrower; rich knows of the lines."""
        rows = sum(max(0, width - 1) // self._console.width for width in self._widths)
        clear = [(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * rows
        return [Control(*clear), *renderables] if rows else renderables
