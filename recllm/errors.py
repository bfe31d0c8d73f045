"""A user's mistake is one sentence: what is wrong, where, and how to mend it. Everything else may be a traceback."""

from os import PathLike


class UserError(Exception):
    """Raised for bad input. `launch.run` prints it on one line and exits with 2, without a traceback.

    UserError("timestamp is not a number: 'x'", file="reviews.json.gz", line=17, fix="correct the line, or skip it with
    --on_bad_line skip") reads `reviews.json.gz, line 17: timestamp is not a number: 'x'. Fix: correct the line, …`.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | PathLike | None = None,
        line: int | None = None,
        fix: str | None = None,
    ):
        self.problem, self.file, self.line, self.fix = problem, file, line, fix
        where = "" if file is None else f"{file}, line {line}: " if line is not None else f"{file}: "
        super().__init__(f"{where}{problem}" + (f". Fix: {fix}" if fix else ""))
