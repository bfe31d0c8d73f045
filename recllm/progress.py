"""One progress bar for every long stage: done of how many, the rate, the time left. On stderr; lines in a log file."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from recllm.launch import console

EVERY = 30.0  # seconds between the lines a log file gets in place of a bar


class RateColumn(ProgressColumn):
    """Units a second, of this run alone: what an earlier run had finished does not count as speed."""

    def render(self, task) -> Text:
        return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="progress.data.speed")


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. `done` is what was finished before, by a run that was interrupted."""
    if not console.is_terminal:
        yield _log_lines(what, total, done)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda n=1: bar.advance(task, n)


def _log_lines(what: str, total: int, done: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    now_done = done

    def advance(n: int = 1) -> None:
        nonlocal last, now_done
        now_done += n
        if (now := time.monotonic()) - last >= EVERY:
            last, rate = now, (now_done - done) / (now - start)
            left = clock((total - now_done) / rate)
            console.print(f"{what} {now_done:,}/{total:,}, {rate:,.1f}/s, {left} left", highlight=False)

    return advance


def clock(seconds: float) -> str:
    """hours:minutes:seconds; days are hours too."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
