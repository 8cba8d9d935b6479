"""`make bench-fetch` works: small, so its figures say nothing."""

from __future__ import annotations

import re

import pytest

from e2e.bench import fetch


def test_it_prints_a_table_with_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    ballast = b"x" * (600 << 20)  # the benchmark makes its content in memory, which is none of the program's
    assert fetch.main(["--bytes", "4000000", "--rounds", "1", "--files", "3", "--sources", "hub"]) == 0
    table = capsys.readouterr().out
    assert "hub, 0.004 GB in 3 files" in table
    for way in ("fetch", "hf download", "curl"):
        assert re.search(rf"^  {way} +\d+\.\d\d s", table, re.MULTILINE), table
    found = re.search(r"verifying took \d+\.\d\d s \(\d+%\), largest resident set ([1-9]\d*) MiB", table)
    assert found is not None, table
    assert int(found[1]) < len(ballast) >> 20, "that is what this process holds"
