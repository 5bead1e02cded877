"""The trace file has whole lines, whatever happens to the disk, the name and the folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from llmproxy.record.jsonl import JsonLines
from llmproxy.record.sink_queue import Dropped
from tests.record.conftest import Disk
from tests.support.records import ids_in, trace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file is."""
    return tmp_path / "t"


@pytest.fixture
def lines(path: Path) -> JsonLines:
    """The file, open."""
    return JsonLines(str(path))


def test_lines_are_appended(path: Path) -> None:
    """The lines come after the old ones, one object a line."""
    path.write_text('{"id":"-1"}\n')
    lines = JsonLines(str(path))
    lines.put([trace(0), trace(1, model="a\nb")])
    lines.put([trace(2)])
    lines.close()
    assert ids_in(path) == [-1, 0, 1, 2]


def test_the_file_is_for_its_owner_and_group(lines: JsonLines, path: Path) -> None:
    """Other users cannot read the names of the callers."""
    assert stat.S_IMODE(path.stat().st_mode) & 0o137 == 0


def test_a_file_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    """The mistake is reported at once, not with the first record."""
    with pytest.raises(OSError, match="No such file"):
        JsonLines(str(tmp_path / "missing" / "t"))


def test_a_full_disk_keeps_the_lines_that_fit(lines: JsonLines, path: Path, disk: Disk) -> None:
    """The other lines are dropped, half lines too, until there is room again."""
    lines.put([trace(0)])
    length = path.stat().st_size
    disk(3 * length + 20)  # two lines fit, and the beginning of a third
    with pytest.raises(Dropped, match="full") as caught:
        lines.put([trace(number) for number in range(1, 6)])
    assert caught.value.count == 3
    assert ids_in(path) == [0, 1, 2]
    disk(3 * length)
    with pytest.raises(OSError, match="too large"):
        lines.put([trace(6)])
    disk(None)
    lines.put([trace(7)])
    assert ids_in(path) == [0, 1, 2, 7]


def test_a_device_that_takes_nothing_is_an_error() -> None:
    """The error has the kernel's words."""
    lines = JsonLines("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        lines.put([trace()])
    lines.close()


def test_a_record_that_cannot_be_json_is_dropped_alone(lines: JsonLines, path: Path) -> None:
    """The other records of the batch are kept."""
    broken = trace(1, model="half a pair: \ud800")
    with pytest.raises(Dropped) as caught:
        lines.put([trace(0), broken, trace(2), broken, trace(3)])
    assert caught.value.count == 2
    assert ids_in(path) == [0, 2, 3]


def test_a_renamed_file_is_written_until_the_file_is_reopened(
    lines: JsonLines, path: Path, tmp_path: Path
) -> None:
    """Logrotate renames first and signals later: nothing is lost between the two."""
    old = tmp_path / "t.1"
    lines.put([trace(0)])
    path.rename(old)
    lines.put([trace(1)])
    assert not path.exists()
    lines.reopen()
    lines.put([trace(2)])
    assert (ids_in(old), ids_in(path)) == ([0, 1], [2])


def test_a_file_that_cannot_be_reopened_stays_open(
    lines: JsonLines, path: Path, tmp_path: Path
) -> None:
    """The open file still takes every record."""
    old = tmp_path / "t.1"
    path.rename(old)
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        lines.reopen()
    lines.put([trace(1)])
    assert ids_in(old) == [1]


def test_a_removed_file_is_made_again(lines: JsonLines, path: Path) -> None:
    """Nobody could read records in a file without a name."""
    lines.put([trace(0)])
    path.unlink()
    lines.put([trace(1)])
    assert ids_in(path) == [1]


def test_a_file_emptied_in_place_goes_on_at_its_beginning(lines: JsonLines, path: Path) -> None:
    """Logrotate's copytruncate leaves no hole."""
    lines.put([trace(0)])
    os.truncate(path, 0)
    lines.put([trace(1)])
    assert ids_in(path) == [1]
