"""What the scripts are told on the command line: nothing that cannot be meant is passed over."""

import os
import subprocess
import sys

import archive_nested_steps
import archive_toy
import archive_toy_patience
import archive_toy_phase
import archive_toy_updates
import pytest
import train_ladder
from conftest import ROOT

TOY, LADDER = ["run", "fig5", "--folder", "{new}"], ["run", "--scale", "demo", "--folder", "{new}"]
CASES = {
    "shards beyond": (archive_toy, [*TOY, "--shards", "99"], "there is no 99, only 0 to"),
    "shards below": (archive_toy, [*TOY, "--shards", "-1"], "at least 0, not -1"),
    "no shards": (archive_toy, [*TOY, "--shards"], "name at least one of 0 to"),
    "no threads": (archive_toy, [*TOY, "--threads", "-1"], "at least 1, not -1"),
    "no steps": (archive_toy, [*TOY, "--steps", "0"], "at least 1, not 0"),
    "a file": (archive_toy, ["run", "fig5", "--folder", "{file}"], "file is a file: name a folder"),
    "in a file": (archive_toy, ["run", "fig5", "--folder", "{file}/a"], "name a folder"),
    "output": (archive_toy, ["assemble", *TOY[1:], "--output", "{folder}"], "name a file"),
    "patience": (
        archive_toy_patience,
        ["run", "--folder", "{new}", "--shards", "99"],
        "there is no 99",
    ),
    "phase": (archive_toy_phase, ["phase", "--steps", "-3"], "at least 1, not -3"),
    "updates": (archive_toy_updates, ["run", "--folder", "{file}"], "name a folder"),
    "nested": (archive_nested_steps, ["--seeds", "0"], "at least 1, not 0"),
    "jobs": (train_ladder, [*LADDER, "--jobs", "0"], "at least 1, not 0"),
    "models beyond": (train_ladder, [*LADDER, "--shards", "99"], "there is no 99"),
    "device": (train_ladder, [*LADDER, "--device", "tpu"], "no device 'tpu' here"),
    "threads": (train_ladder, [*LADDER, "--threads", "two"], "at least 1, not two"),
    "rates": (train_ladder, [*LADDER, "--rates", "0"], "above 0 and at most 1, not 0"),
    "not a number": (train_ladder, [*LADDER, "--rates", "nan"], "a number above 0, not nan"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_status_two(name, tmp_path, capsys, monkeypatch):
    script, arguments, message = CASES[name]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    places = {kind: tmp_path / kind for kind in ("file", "folder", "new")}
    arguments = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and "Traceback" not in last
    assert not (tmp_path / "new").exists()


def test_benchmarks_too():
    command = [sys.executable, "benchmarks/recording.py", "--device", "tpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 2 and "no device 'tpu' here" in ended.stderr
