"""Tables of results that are written row by row."""

import csv
import json
from unittest.mock import Mock

import pytest

from dat.utils.tables import Tables

ROWS = [{"name": "a", "score": 0.25, "box": [1, 2]}, {"name": "=b", "score": 1}]


def read(stem):
    with stem.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")), list(csv.reader(file))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_both_files_hold_the_rows(tmp_path, count):
    stem = tmp_path / "out/found"
    with Tables(stem, ("name", "label", "score")) as tables:
        for row in ROWS[:count]:
            tables.add(row, label="x")
    cells = [["a", "x", "0.25"], ["'=b", "x", "1"]]
    assert read(stem) == (ROWS[:count], [["name", "label", "score"], *cells[:count]])
    assert len(list(stem.parent.iterdir())) == 2


def write_and_raise(stem, error, *rows):
    with Tables(stem, ("name",)) as tables:
        for row in rows:
            tables.add(row)
        raise error


def test_an_interruption_keeps_the_rows_before_it(tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"found\.json and \.csv hold what came before"):
        write_and_raise(tmp_path / "found", KeyboardInterrupt(), ROWS[0])
    assert read(tmp_path / "found") == (ROWS[:1], [["name"], ["a"]])


def test_an_interruption_before_the_first_row_keeps_the_files_before_it(tmp_path, monkeypatch):
    """Also while the files are opened."""
    stem = tmp_path / "found"
    with Tables(stem, ("name",)) as tables:
        tables.add(ROWS[0])
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        write_and_raise(stem, KeyboardInterrupt())

    monkeypatch.setattr("dat.utils.tables.atomic_write", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        write_and_raise(stem, AssertionError, ROWS[1])
    assert read(stem) == (ROWS[:1], [["name"], ["a"]])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failure_keeps_the_files_before_it_and_makes_no_folder(tmp_path):
    stem = tmp_path / "found"
    with Tables(stem, ("name",)) as tables:
        tables.add(ROWS[0])
    for row in ROWS:
        with pytest.raises(OSError, match="no"):
            write_and_raise(stem, OSError("no"), row)
    assert read(stem) == (ROWS[:1], [["name"], ["a"]])
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OSError, match="no"):
        write_and_raise(tmp_path / "new/found", OSError("no"))
    assert not (tmp_path / "new").exists()
