import subprocess
import sys

import pytest

from depthutil import _runs


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_runs.time, "perf_counter", lambda: now[0])
    return now


def test_progress_tells_every_ten_seconds_and_at_the_end(clock, capsys):
    report = _runs.Progress(True, 100, done=40)
    for done, seconds in ((41, 6), (42, 12), (43, 14), (100, 15)):
        clock[0] = 100 + seconds
        report(done, "so far")
    said = capsys.readouterr().err.splitlines()
    # Two of the sixty steps that were left took 12 s, so that 58 take 348 s.
    assert said == [
        "step 42 of 100, so far, 5.8 min left",
        "step 100 of 100, so far, 0.0 min left",
    ]
    assert report.seconds == 15


def test_a_first_step_that_compiles_is_not_counted(clock):
    said = []
    report = _runs.Progress(lambda *it: said.append(it), 11, first=False)
    for done, seconds in ((1, 60), (2, 61), (3, 62)):
        clock[0] = 100 + seconds
        report(done)
    assert [left for _, _, left in said] == [600, 9, 8]


def test_nothing_is_said_of_the_time_left_where_the_total_is_unknown(clock, capsys):
    report = _runs.Progress(True, None, of="batch")
    clock[0] += 11
    report(3, "44 tokens")
    assert capsys.readouterr().err == "batch 3, 44 tokens\n"
    _runs.Progress(False, 1)(1)
    assert capsys.readouterr().err == ""


def test_a_claim_ends_with_its_process(tmp_path):
    path = tmp_path / "new" / "a.pt"
    code = f"""
import os
from depthutil import _runs
with _runs.claimed({str(path)!r}) as mine:
    print(mine, flush=True)
    input()
    os._exit(1)  # without leaving the block
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    with _runs.claimed(path) as mine:
        assert not mine
    other.communicate("\n")
    with _runs.claimed(path, wait=True) as mine:
        assert mine
        with _runs.claimed(path) as again:
            assert not again


def test_the_number_of_threads_is_put_back_whatever_happens():
    before = _runs.torch.get_num_threads()
    with pytest.raises(KeyError), _runs.cpu(before + 1):
        assert _runs.torch.get_num_threads() == before + 1
        raise KeyError
    assert _runs.torch.get_num_threads() == before
