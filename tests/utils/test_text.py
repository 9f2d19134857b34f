"""Names of unknown origin in terminals, logs and tables."""

import csv
import logging

import pytest

from dat.engine.logger import RunLogger
from dat.engine.report import Page, Section, Table
from dat.utils.tables import write_csv
from dat.utils.text import echo, printable

HOSTILE = "caf\udce9 \x1b[31m \u202e \x9b \ud800 \r"
SHOWN = r"caf\udce9 \x1b[31m \u202e \x9b \ud800 \r"


def test_what_a_terminal_would_obey_is_shown():
    assert printable(HOSTILE) == SHOWN
    assert printable(SHOWN) == SHOWN
    assert printable("a\tb\nc") == r"a\tb\nc"
    assert printable("a\tb\nc", keep="\n\t") == "a\tb\nc"
    assert printable("naïve 東京 עברית 👩") == "naïve 東京 עברית 👩"


def test_printed_and_logged_lines(tmp_path, capfd, monkeypatch):
    # pytest would send what it captures of the log to another process, which no surrogate survives.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    echo(f"a\n{HOSTILE}")
    echo(HOSTILE, error=True)
    assert capfd.readouterr() == (f"a\n{SHOWN}\n", f"{SHOWN}\n")
    log = RunLogger(tmp_path)
    log.warning(HOSTILE)
    logging.getLogger("timm").warning(HOSTILE)
    log.close()
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.partition(" ")[2] for line in lines] == [f"warning: {SHOWN}", SHOWN]
    assert "\x1b" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=cmd()", "'=cmd()"), ("+1+cmd", "'+1+cmd"), ("-1.5", "-1.5"), (-1.5, "-1.5"), ("-a", "'-a"), ("@a", "'@a"),
        ("\t=1", r"\t=1"), ("\r=1", r"\r=1"), (HOSTILE, SHOWN), ("a=b", "a=b"), (None, ""),
    ],
)  # fmt: skip
def test_cells_of_tables_are_no_formulas(tmp_path, value, cell):
    write_csv(tmp_path / "a.csv", [{"name": value, "score": -0.5}], ["name", "score"])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["name", "score"], [cell, "-0.5"]]


def test_reports_are_written_with_any_name(tmp_path):
    page = Page(HOSTILE, sections=[Section("a", tables=[Table(["name"], [[HOSTILE]])])])
    page.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count(SHOWN) == 3
