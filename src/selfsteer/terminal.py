"""What a person sees while a stage works: rich bars on a terminal, plain lines elsewhere."""

import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from selfsteer import stopping

#: C0 without tab and line feed, DEL, C1, and what turns the direction of lines or ends them: what
#: steers a terminal, as what can be read.
CONTROL = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"} | {
    c: f"\\u{c:04x}" for c in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


class Screen(Console):
    """A console on which data cannot move the cursor, colour, or write into the clipboard.

    Answers of models and the ledgers of other people's runs are shown, and may hold anything.
    """

    def render_str(self, text: str, *args: Any, **kwargs: Any) -> Text:
        """See `rich.console.Console.render_str`, through which all plain strings pass."""
        return super().render_str(text.translate(CONTROL), *args, **kwargs)


#: Results go to stdout, everything about the work itself to stderr; in a notebook as well, where
#: rich would make a box of HTML of each line.
out = Screen(highlight=False, soft_wrap=True, emoji=False, force_jupyter=False)
err = Screen(stderr=True, highlight=False, soft_wrap=True, emoji=False, force_jupyter=False)

PLAIN_LINE_EVERY_S = 30.0

#: Characters to which a table's column of words may be folded.
NARROWEST = 24

#: Rates are over so many advances, a second or more apart.
RATE_POINTS = 60


class LastingStream:
    """A stream that goes nowhere once it cannot be written: its reader is gone, or its disk full.

    Work goes on without being told of.

    Args:
        stream: such as stderr.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        try:
            return self._stream.write(text)
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        """See `io.IOBase.flush`."""
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        # what is buffered goes there, too; at the end of the process it would be tried again
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def is_main_process() -> bool:
    """False on every rank but the first of a torchrun world."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str, style: str = "") -> None:
    """One line about the work; data inside is never read as markup."""
    if is_main_process():
        err.print(escape(text), style=style or None)


def warn(text: str) -> None:
    """One line that a person should not miss."""
    say(f"warning: {text}", "yellow")


def duration(s: float) -> str:
    """Seconds as a person would say them.

    >>> duration(42), duration(1500), duration(30000), duration(400000)
    ('42 s', '25 min', '8.3 h', '4.6 days')
    """
    for unit, size, bound in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 172800)):
        if s < bound:
            return f"{s / size:.1f} {unit}" if unit == "h" else f"{s / size:.0f} {unit}"
    return f"{s / 86400:.1f} days"


def interval(
    value: float | Sequence[float | None] | None, form: str = "+.3f", missing: str = ""
) -> str:
    """``+0.094 [+0.084, +0.104]``; without an interval the value alone; ``missing`` for None."""
    if value is None:
        return missing
    values = value if isinstance(value, Sequence) else [value]
    form = form.replace(".", "z.")  # what rounds to zero has no minus
    mean, *bounds = (f"{v:{form}}" for v in values if v is not None)
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean


def table(
    columns: Sequence[str],
    rows: Iterable[Iterable[object]],
    *,
    title: str = "",
    words: int | Collection[int] = 1,
) -> Table:
    """A table without lines, as wide as it has to be; its texts are data, never markup.

    Args:
        columns: names; an empty one has no heading, a long one several lines.
        rows: a cell per column; None stays empty.
        title: above the table.
        words: how many columns, or which, are of words and so to the left; the others are of
            figures.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    made = Table(title=escape(title) or None, title_justify="left", box=None, pad_edge=False)
    made.padding, made.show_header = (0, 1, 0, 0), any(columns)
    of_words = range(words) if isinstance(words, int) else words
    least = len(columns) - 1
    for place, name in enumerate(columns):
        widest = max(map(len, [*name.split(), *(row[place] for row in cells), "-"]))
        heading = escape("\n".join(textwrap.wrap(name, widest)))
        is_words = place in of_words
        justify: Any = "left" if is_words else "right"
        made.add_column(heading, justify=justify, vertical="bottom", no_wrap=not is_words)
        least += min(widest, NARROWEST) if is_words else widest
    for row in cells:
        made.add_row(*map(escape, row))
    if least > out.width:  # better too wide than figures that are cut off
        made.width = least
    return made


class Bar:
    """Counts items and, where given, tokens; knows its rate over the last minute or so."""

    def __init__(
        self, label: str, total: int | None, progress: Progress | None, most: int | None = None
    ) -> None:
        self._most = most
        self.label, self.total, self.done, self.tokens = label, total, 0, 0
        self._skipped = 0
        self._progress = progress
        self._task = progress.add_task(label, total=total, facts="") if progress else None
        now = time.monotonic()
        self._said = self._told = now
        # (when, items, tokens), one a second at most: old ones fall out at the left
        self._points = deque([(now, 0, 0)], maxlen=RATE_POINTS)

    def skip(self, items: int) -> None:
        """Counts items that were finished before; they say nothing about the rate."""
        self._skipped += items
        self.advance(items)

    def advance(self, items: int, tokens: int = 0) -> None:
        """Adds finished items and the tokens they cost."""
        stopping.if_asked()
        self.done += items
        self.tokens += tokens
        now = time.monotonic()
        if now - self._points[-1][0] >= 1:
            self._points.append((now, self.done - self._skipped, self.tokens))
        if _watcher is not None and now - self._told >= 1:
            self._told = now
            _watcher(self)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self.done, facts=self.facts())
        elif now - self._said >= PLAIN_LINE_EVERY_S:
            self._said = now
            of = f"/{self.total:,}" if self.total is not None else ""
            say(f"  {self.label}: {self.done:,}{of} {self.facts()}")

    @property
    def rates(self) -> tuple[float, float]:
        """Items and tokens per second; zeros before anything is finished."""
        then, items, tokens = self._points[0]
        seconds = max(time.monotonic() - then, 1e-6)
        return (self.done - self._skipped - items) / seconds, (self.tokens - tokens) / seconds

    @property
    def seconds_left(self) -> float | None:
        """None where it cannot be known."""
        rate, _ = self.rates
        return (self.total - self.done) / rate if self.total is not None and rate else None

    def facts(self) -> str:
        """``6,050 tok/s, about 3 min left``."""
        items, tokens = self.rates
        said = []
        if tokens:
            said.append(f"{tokens:,.0f} tok/s")
        elif items:
            said.append(f"{items:,.1f}/s" if items >= 1 else f"{1 / items:,.1f} s each")
        if self.seconds_left:
            said.append(f"about {duration(self.seconds_left)} left")
        elif tokens and self._most and self.total is not None:  # nothing is finished yet
            left = (self.total - self.done) * self._most - self.tokens
            said.append(f"at most {duration(max(left, 0) / tokens)} left")
        return ", ".join(said)


_watcher: Callable[[Bar], None] | None = None


@contextmanager
def watched(watcher: Callable[[Bar], None]) -> Iterator[None]:
    """Shows every bar of the block to ``watcher``: when it begins and then once a second."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


@contextmanager
def progress_bar(label: str, total: int | None, most: int | None = None) -> Iterator[Bar]:
    """A bar with rate and time left; plain lines, one per half minute, when piped.

    Args:
        label: what is being done.
        total: how many items; None where it is not known.
        most: tokens of an item at most, which bound the time left before one is finished.
    """
    if not (err.is_terminal and sys.stderr.isatty() and is_main_process()) or "CI" in os.environ:
        yield _begin(Bar(label, total, None, most))
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield _begin(Bar(escape(label), total, progress, most))


def _begin(bar: Bar) -> Bar:
    if _watcher is not None:
        _watcher(bar)
    return bar
