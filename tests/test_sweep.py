"""Sweeps on worker processes: equal results, and what the death of a worker costs."""

import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from inspect import signature
from multiprocessing import forkserver
from pathlib import Path

import dask
import pandas as pd
import pytest
from conftest import ROOT
from distributed import Client, LocalCluster, WorkerPlugin

from depthutil import archive, toy

SMALL = toy.ToyConfig(
    width=4,
    vocabulary=6,
    teacher_depth=6,
    depths=(2,),
    teachers=(0, 1),
    rhos=(1.0, 0.0),
    batch=8,
    steps=45,
    learning_rate=1e-2,
    test_every=15,
)
SHARDS = toy.shards(SMALL)
# Explodes at its second step, where the others train.
DOOMED = replace(SHARDS[0], learning_rate=1e200, dtype="float64")
KILLED_AT = 20


def watch(log: str, doomed: str, when: str) -> None:
    """In a worker, write down every step, and be there to be killed in the middle of one grid.

    Whoever first gets to step ``KILLED_AT`` of the grid ``doomed`` waits after each further
    step to be killed from outside, or kills itself halfway through writing a checkpoint.
    """
    advance, save, os_replace = toy.grid.Trainer.advance, toy.grid.Trainer.save, os.replace
    target = Path(log + ".killed")

    def watched_advance(trainer):
        name = toy.slug(trainer.config)
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {name} {trainer.step}\n")
        advance(trainer)
        if name == doomed and trainer.step >= KILLED_AT:
            if not target.exists():
                target.write_text(str(os.getpid()))
            if when == "training" and target.read_text() == str(os.getpid()):
                time.sleep(0.3)

    def watched_save(trainer, path):
        def replace_or_die(*args):
            if target.exists() and target.read_text() == str(os.getpid()):
                os.kill(os.getpid(), signal.SIGKILL)
            os_replace(*args)

        toy.grid.os.replace = replace_or_die if when == "writing" else os_replace
        save(trainer, path)

    toy.grid.Trainer.advance, toy.grid.Trainer.save = watched_advance, watched_save


class Watch(WorkerPlugin):
    """Watches in every worker of a cluster, also in those that replace the dead."""

    def __init__(self, *what):
        self.what = what

    def setup(self, worker):
        watch(*self.what)


def steps_of(log: Path) -> pd.DataFrame:
    return pd.read_csv(log, sep=" ", names=["pid", "grid", "step"])


def same(results, others) -> bool:
    for one, other in zip(results, others, strict=True):
        pd.testing.assert_frame_equal(one.losses, other.losses, check_exact=True)
        assert one.config == other.config
    return True


@pytest.fixture(scope="module")
def context():
    """Processes that start from one which has imported all that training imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["depthutil.toy", "distributed", "torch._dynamo"])
    forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def here():
    """The same grids, trained one after another in this process."""
    return toy.sweep(SHARDS, threads=1)


@pytest.fixture(scope="module")
def client(context):
    options = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster,
        Client(cluster) as client,
    ):
        yield client


# Dask -----------------------------------------------------------------------------------


def test_a_sweep_on_dask_equals_one_here(client, here, capsys):
    there = toy.sweep(SHARDS, client.get_executor(), progress=True)
    assert same(there, here)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" after ")[0] for line in lines] == [
        f"grid {i} of 4 finished" for i in (1, 2, 3, 4)
    ]
    assert {line.split(": ")[1] for line in lines} == {toy.slug(shard) for shard in SHARDS}


def test_dask_does_not_answer_from_memory(client, tmp_path):
    # It takes equal calls for one: a grid that failed would fail for ever.
    executor = client.get_executor()
    (tmp_path / f"{toy.slug(SHARDS[0])}.pt").write_text("no checkpoint")
    with pytest.raises(toy.SweepError, match="is not a whole checkpoint") as error:
        toy.sweep(SHARDS[:1], executor, checkpoints=tmp_path)
    (tmp_path / f"{toy.slug(SHARDS[0])}.pt").unlink()
    assert toy.sweep(SHARDS[:1], executor, checkpoints=tmp_path)[0].losses["step"].max() == 45
    assert isinstance(error.value.errors[0], ValueError)


def test_a_worker_killed_while_it_trains_costs_one_checkpoint_interval(client, here, tmp_path):
    log, doomed = tmp_path / "steps", toy.slug(SHARDS[1])
    client.register_plugin(Watch(str(log), doomed, "training"), name="watch")
    killed = Path(f"{log}.killed")

    def kill():
        while not killed.exists() or not killed.read_text():
            time.sleep(0.01)
        os.kill(int(killed.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    options = {"checkpoints": tmp_path / "grids", "checkpoint_seconds": 0}
    results = toy.sweep(SHARDS, client.get_executor(), **options)
    killer.join()
    client.unregister_worker_plugin("watch")
    assert same(results, here)
    table = steps_of(log)
    dead = int(killed.read_text())
    lost = table[(table["grid"] == doomed) & (table["pid"] == dead)]["step"].max()
    resumed = table[(table["grid"] == doomed) & (table["pid"] != dead)]["step"].min()
    # A checkpoint after each step: at most the step in whose middle it died is repeated.
    assert KILLED_AT - 1 <= lost < SMALL.steps - 1 and lost <= resumed <= lost + 1
    others = table[table["grid"] != doomed]
    assert not others.duplicated(["grid", "step"]).any()
    assert len(others) == 3 * SMALL.steps


# A pool of processes --------------------------------------------------------------------


def test_a_pool_whose_worker_dies_while_writing_can_be_replaced(context, here, tmp_path):
    log, doomed = tmp_path / "steps", toy.slug(SHARDS[1])
    options = {"checkpoints": tmp_path / "grids", "checkpoint_seconds": 0}
    with ProcessPoolExecutor(2, context, watch, (str(log), doomed, "writing")) as executor:
        with pytest.raises(toy.SweepError) as caught:
            toy.sweep(SHARDS, executor, **options)
        with pytest.raises(toy.SweepError, match="4 of 4 grids"):
            toy.sweep(SHARDS, executor, **options)
    error = caught.value
    assert isinstance(error.errors[1], BrokenProcessPool)
    assert doomed in str(error) and "the same arguments and a new executor" in str(error)
    assert str(tmp_path / "grids") in str(error) and "\n" not in str(error)
    first = steps_of(log)
    with ProcessPoolExecutor(2, context, watch, (str(log), doomed, "training")) as executor:
        assert same(toy.sweep(SHARDS, executor, **options), here)
    second = steps_of(log)[len(first) :]
    assert first[first["grid"] == doomed]["step"].max() == KILLED_AT - 1
    # Step 19 was trained, its checkpoint was not yet there: it is the only one to repeat.
    assert second[second["grid"] == doomed]["step"].min() == KILLED_AT - 1
    for i, shard in enumerate(SHARDS):
        if error.results[i] is not None:
            assert toy.slug(shard) not in set(second["grid"])


# Failures, without processes ------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_a_grid_that_fails_does_not_take_the_others_along(parallel, here, tmp_path, capsys):
    configs = [SHARDS[0], DOOMED, SHARDS[1]]
    options = {"checkpoints": tmp_path, "progress": True}
    executor = ThreadPoolExecutor(1) if parallel else None
    with pytest.raises(toy.SweepError) as caught:
        toy.sweep(configs, executor, **options, threads=1)
    if executor:
        executor.shutdown()
    error = caught.value
    assert str(error).startswith(f"1 of 3 grids have not reached their end: {toy.slug(DOOMED)} (")
    assert "the loss of the student of depth" in str(error) and "new executor" not in str(error)
    assert isinstance(error.__cause__, FloatingPointError) and list(error.errors) == [1]
    assert error.results[1] is None and same([error.results[0], error.results[2]], here[:2])
    assert re.search(r"grid 2 of 3 failed after 0\.\d min: ", capsys.readouterr().err)
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_without_checkpoints_the_error_holds_what_is_done(here):
    with pytest.raises(toy.SweepError, match="This error has the others' results") as caught:
        toy.sweep([DOOMED, SHARDS[0]], threads=1)
    assert same(caught.value.results[1:], here[:1])


def test_wrong_arguments_are_named_before_anything_is_trained(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        toy.sweep(SHARDS, step=3)
    with pytest.raises(TypeError, match="configs are ToyConfigs, not dict"):
        toy.sweep([{}])
    longer = replace(SHARDS[0], steps=120)
    with pytest.raises(ValueError, match=r"two of the configs have the checkpoint teacher0_rho1_"):
        toy.sweep([SHARDS[0], longer], checkpoints=tmp_path)
    assert not list(tmp_path.iterdir())
    assert toy.sweep([]) == []


def test_grids_that_wait_are_called_off_by_an_interruption():
    class Interrupted(ThreadPoolExecutor):
        def submit(self, *_):
            waiting.append(Future())
            return waiting[-1]

    waiting: list[Future] = []

    def interrupt():
        while len(waiting) < 4:
            time.sleep(0.01)
        waiting[0].set_exception(KeyboardInterrupt())

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        toy.sweep(SHARDS, Interrupted())
    thread.join()
    assert [future.cancelled() for future in waiting] == [False, True, True, True]


# Several GPUs ---------------------------------------------------------------------------


def visible(_) -> str:
    time.sleep(0.3)  # long enough for the other process to take the next one
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_process_of_a_gpu_pool_sees_one_gpu(context, monkeypatch):
    monkeypatch.setattr(toy.sweeps, "get_context", lambda _: context)
    with toy.gpu_pool([0, "GPU-5f"]) as executor:
        seen = set(executor.map(visible, range(4)))
    assert seen <= {"0", "GPU-5f"} and len(seen) == 2
    monkeypatch.setattr(toy.sweeps.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="PyTorch sees no GPU here"):
        toy.gpu_pool()


def test_a_gpu_pool_keeps_to_the_gpus_it_was_given(monkeypatch):
    monkeypatch.setattr(toy.sweeps.torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(
        toy.sweeps, "ProcessPoolExecutor", lambda n, *rest: taken.append((n, rest[-1]))
    )
    for gpus, names in ((None, ["0", "1"]), ("2,5", ["2", "5"])):
        if gpus:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        toy.gpu_pool()
        count, (queue,) = taken.pop()
        assert count == 2 and [queue.get() for _ in range(2)] == names


# The page -------------------------------------------------------------------------------

PAGE = ROOT / "chapters" / "reference" / "more_machines.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def test_the_program_for_several_cores_runs(context, tmp_path, monkeypatch, capsys):
    (code,) = (block for block in BLOCKS if "ProcessPoolExecutor" in block)
    config = 'toy.ToyConfig.paper("fig3b", "colab")'
    assert config in code and 'ProcessPoolExecutor(8, get_context("spawn"))' in code
    settings = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    code = code.replace(config, f"toy.ToyConfig(**{settings})").replace("Executor(8", "Executor(2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
    assert "grid 4 of 4 finished" in capsys.readouterr().err
    assert toy.ToyResult.load(tmp_path / "fig3b.parquet").config.teachers == (0, 1)


def test_the_program_for_slurm_asks_for_what_it_says(monkeypatch):
    """Everything but Slurm: the job script, and the sweep on a stand-in for the cluster."""
    import dask_jobqueue
    from dask_jobqueue.slurm import SLURMJob

    (code,) = (block for block in BLOCKS if "SLURMCluster" in block)
    asked = []

    class Cluster:
        def __init__(self, **options):
            asked.append(SLURMJob(scheduler="tcp://1.2.3.4:5", name="worker", **options))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append("closed")

        def adapt(self, **jobs):
            signature(dask_jobqueue.core.JobQueueCluster.adapt).bind(self, **jobs)
            asked.append(jobs)

    class FakeClient(Cluster):
        def __init__(self, cluster):
            pass

        def get_executor(self):
            return "the executor"

    def fake_sweep(shards, executor, checkpoints, progress):
        limit = dask.config.get("distributed.scheduler.allowed-failures")
        asked.append((len(shards), executor, checkpoints, limit))
        raise KeyboardInterrupt

    monkeypatch.setattr(dask_jobqueue, "SLURMCluster", Cluster)
    monkeypatch.setattr("distributed.Client", FakeClient)
    monkeypatch.setattr(toy, "sweep", fake_sweep)
    with dask.config.set({"distributed.scheduler.allowed-failures": 3}):
        with pytest.raises(KeyboardInterrupt):
            exec(compile(code, "sweep.py", "exec"), {"__name__": "__main__"})
    job, jobs, sweep, *closed = asked
    script = job.job_script()
    assert "#SBATCH -t 04:00:00" in script and "#SBATCH --cpus-per-task=4" in script
    assert "source ~/depthbook/bin/activate\n" in script
    assert "--nthreads 1 " in script and "--nworkers 4 " in script
    assert jobs == {"minimum_jobs": 0, "maximum_jobs": 16}
    assert sweep == (6, "the executor", "/scratch/me/fig3b", 1000) and closed == ["closed"] * 2


def test_every_program_of_the_page_names_what_exists():
    for code in BLOCKS:
        for module, name in re.findall(r"\b(toy|archive)\.(\w+)", code):
            assert hasattr({"toy": toy, "archive": archive}[module], name), name
