"""One page about one run or several: `python report.py runs/a runs/b`.

What differs between their configurations, the curves of every metric over each other (runs that differ in
their seed only as mean and band), held-out rows before and after, warnings, samples with their rewards, and
the commands. The page needs neither a server nor the network. Every run writes its own at its end.

    python report.py RUN [RUN ...] [output=report.html] [--markdown]

`--markdown` prints the tables instead.
"""

from data.command import as_typed
from data.errors import UserError, run_program
from engine.report import as_markdown, page, read_run


def main(argv: list[str]) -> None:
    directories, output = [], "report.html"
    for word in argv:
        if word in ("-h", "--help"):
            return print(as_typed(__doc__))
        if word.startswith("output="):
            output = word.partition("=")[2]
        elif word.startswith("--") and word != "--markdown":
            raise UserError(f"{word} is unknown; fix: write runs, output=PATH or --markdown")
        elif not word.startswith("--"):
            directories.append(word)
    if not directories:
        raise UserError("no run is named; fix: python report.py runs/NAME")
    runs = []
    for directory in directories:
        run = read_run(directory)
        if run is None:
            raise UserError(f"{directory} is not a run; fix: pass a run's directory, such as runs/tiny-dpo")
        if not run.train and not run.held_out:
            raise UserError(f"{directory} has logged nothing yet; fix: wait for its first update")
        runs.append(run)
    if "--markdown" in argv:
        return print(as_markdown(runs), end="")
    try:
        with open(output, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page(runs))
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); "
                        "fix: choose another output") from error
    print(f"report  {output}")


if __name__ == "__main__":
    run_program(main)
