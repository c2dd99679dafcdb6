"""What the scripts are told on the command line: nothing that cannot be meant is passed over."""

import os
import subprocess
import sys

import archive
import pytest
from conftest import ROOT

TOY, LADDER = ["fig5", "run", "--folder", "{new}"], ["ladder", "run", "--folder", "{new}"]
CASES = {
    "nothing": (["fig9", "run"], "invalid choice: 'fig9'"),
    "shards beyond": ([*TOY, "--shards", "99"], "there is no 99, only 0 to"),
    "shards below": ([*TOY, "--shards", "-1"], "at least 0, not -1"),
    "no shards": ([*TOY, "--shards"], "name at least one of 0 to"),
    "no threads": ([*TOY, "--threads", "-1"], "at least 1, not -1"),
    "no steps": ([*TOY, "--steps", "0"], "at least 1, not 0"),
    "a file": (["fig5", "run", "--folder", "{file}"], "file is a file: name a folder"),
    "in a file": (["fig5", "run", "--folder", "{file}/a"], "name a folder"),
    "output": (["fig5", "assemble", *TOY[2:], "--results", "{file}"], "name a folder"),
    "patience": (["patience", "run", "--folder", "{new}", "--shards", "99"], "there is no 99"),
    "phase": (["phase", "run", "--folder", "{new}", "--steps", "-3"], "at least 1, not -3"),
    "updates": (["updates", "run", "--folder", "{file}"], "name a folder"),
    "nested": (["nested_steps", "run", "--folder", "{new}", "--seeds", "0"], "at least 1, not 0"),
    "jobs": ([*LADDER, "--jobs", "0"], "at least 1, not 0"),
    "models beyond": ([*LADDER, "--shards", "99"], "there is no 99"),
    "device": ([*LADDER, "--device", "tpu"], "no device 'tpu' here"),
    "threads": ([*LADDER, "--threads", "two"], "at least 1, not two"),
    "rates": ([*LADDER, "--rates", "0"], "above 0 and at most 1, not 0"),
    "not a number": ([*LADDER, "--rates", "nan"], "a number above 0, not nan"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_status_two(name, tmp_path, capsys):
    arguments, message = CASES[name]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    places = {kind: tmp_path / kind for kind in ("file", "folder", "new")}
    arguments = [argument.format(**places) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        archive.main(arguments)
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and "Traceback" not in last
    assert not (tmp_path / "new").exists()


def test_benchmarks_too():
    command = [sys.executable, "benchmarks/recording.py", "--device", "tpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 2 and "no device 'tpu' here" in ended.stderr
