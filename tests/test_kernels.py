"""The Triton kernels against their PyTorch twin and against float64.

Where there is a GPU they run on it, elsewhere in Triton's interpreter.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from depthutil import toy
from depthutil.toy import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, at first use

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed, it has no build for this system"
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU here")

# depth, networks, batch, width, hidden: none but the last fills its blocks. A tile is 64
# inputs of width 32 or less, 32 of width 64; hidden units go by 32.
SHAPES = [
    (1, 1, 1, 1, 2),
    (3, 3, 5, 4, 7),
    (1, 2, 131, 16, 48),
    (2, 1, 70, 20, 33),
    (1, 1, 67, 32, 128),
    (1, 1, 33, 64, 40),
    (1, 1, 128, 32, 64),
]
SMALL = toy.ToyConfig(
    width=6,
    vocabulary=10,
    teacher_depth=3,
    depths=(1, 2),
    rhos=(0.0,),
    teachers=(0, 3),
    temperatures=(0.1, 1.0),
    batch=20,
    steps=4,
    test_every=4,
    test_batches=2,
)
MSE = {"loss": "mse", "head": "none", "temperatures": (1.0,)}


def drawn(depth, networks, batch, width, hidden, order):
    """Weights and inputs, in float64."""
    torch.manual_seed(depth + networks + batch + width + hidden)
    mlps, options = depth * order, {"dtype": torch.float64}
    w1 = torch.randn(mlps, networks, hidden, width, **options) / width**0.5
    b = torch.randn(mlps, networks, hidden, **options)
    w2 = torch.randn(mlps, networks, width, hidden, **options) / hidden
    return [w1, b, w2], torch.randn(networks, batch, width, **options)


def there_and_back(stack, x, grad):
    """The last state and the weights' gradients."""
    last = stack.forward(x, keep=True)
    into = [torch.full_like(weight, torch.nan) for weight in (stack.w1, stack.b, stack.w2)]
    stack.backward(grad, into)
    return [last.clone(), *into]


def close(got, want, within):
    """Compared with the largest number of its kind, as rounding errors of sums are."""
    for mine, exact in zip(got, want, strict=True):
        exact = exact.to(mine.device).double()
        gap = (mine.double() - exact).abs().max()
        assert gap <= within * exact.abs().max(), gap.item()


# The kernels ----------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_equal_their_twin_and_float64(shape, order):
    weights, x = drawn(*shape, order)
    grad = torch.randn_like(x)
    exact = there_and_back(kernels.Stack(*weights, order), x, grad)
    single = [[t.float().to(DEVICE) for t in some] for some in (weights, (x, grad))]
    twin = there_and_back(kernels.Stack(*single[0], order), *single[1])
    stack = kernels.FusedStack(*single[0], order)
    fused = there_and_back(stack, *single[1])
    close(twin, exact, 1e-5)
    close(fused, exact, 1e-5)
    close(fused, twin, 1e-5)
    # All states, which for order 2 are not all that is kept.
    states = stack.forward(single[1][0], states=True)
    close([states], [kernels.Stack(*weights, order).forward(x, states=True)], 1e-5)
    assert torch.equal(states[-1], stack.forward(single[1][0]))
    assert torch.equal(states[-1], fused[0])


@needs_triton
def test_equal_runs_give_equal_bits_whatever_memory_held_before():
    weights, x = drawn(2, 2, 150, 32, 40, 1)
    weights, x = [w.float().to(DEVICE) for w in weights], x.float().to(DEVICE)
    stack = kernels.FusedStack(*weights)
    first = there_and_back(stack, x, x)
    for array in stack.memory.arrays.values():
        array.fill_(torch.nan)
    assert all(map(torch.equal, first, there_and_back(stack, x, x)))
    # A stack need not be given its inputs in one piece of memory.
    scattered = x.mT.contiguous().mT
    assert all(map(torch.equal, first, there_and_back(stack, scattered, scattered)))


@needs_triton
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_weight_that_is_no_number_is_not_hidden(which):
    weights, x = drawn(1, 2, 5, 4, 7, 1)
    weights = [w.float().to(DEVICE) for w in weights]
    weights[which][0, 1].view(-1)[0] = torch.nan
    last = kernels.FusedStack(*weights).forward(x.float().to(DEVICE))
    assert last[0].isfinite().all() and last[1].isnan().any(1).any()


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from depthutil.toy import fused, kernels

capability, width, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
settings = kernels.settings(width, 4 * width, precision)
options = {name: settings.pop(name) for name in kernels.OPTIONS}
for kernel, more in ((fused.forward, {"ORDER": 1, "KEEP": True}), (fused.backward, {})):
    fixed = settings | more
    kinds = {n: "i32" if n in ("mlps", "networks", "batch") else "*fp32" for n in kernel.arg_names}
    kinds |= dict.fromkeys(fixed, "constexpr")
    source = ASTSource(kernel, kinds, {(kernel.arg_names.index(n),): v for n, v in fixed.items()})
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, made.metadata.shared)
"""


# KiB of shared memory a program may have: T4, and H100 or H200.
@needs_triton
@pytest.mark.parametrize(("capability", "precision", "kib"), [(75, "ieee", 64), (90, "tf32", 227)])
def test_the_kernels_compile_and_fit_cards_that_are_not_here(capability, precision, kib):
    arguments = [str(capability), "32", precision]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    needs = dict(line.split() for line in run.stdout.splitlines())
    assert set(needs) == {"forward", "backward"}
    assert all(0 < int(shared) <= kib * 1024 for shared in needs.values()), needs


# The training step ----------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    "changes",
    [{"teachers": (3,), "seeds": (0, 5)}, {**MSE, "order": 2}],
    ids=["own", "second-order"],
)
def test_training_with_the_kernels_equals_training_with_their_twin(changes):
    config = replace(SMALL, **changes)
    runs = {
        kernel: toy.train(config, kernel=kernel, device=DEVICE, students=True, graph=False)
        for kernel in ("torch", "triton")
    }
    assert [run.kernel for run in runs.values()] == ["torch", "triton, ieee"]
    losses = [torch.tensor(run.losses["loss"].to_numpy()) for run in runs.values()]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-7)
    # Adam turns a rounding error of a gradient into one of a step where the gradient is
    # near zero: a few steps of 6e-4 for a few weights.
    for key, weights in runs["torch"].weights.items():
        for mine, theirs in zip(weights, runs["triton"].weights[key], strict=True):
            if mine is not None:
                assert (mine - theirs).abs().max() < 6e-4 * config.steps
                assert (mine - theirs).abs().mean() < 1e-6


def test_a_gpu_is_watched_now_and_then(monkeypatch):
    # What a GPU does, on the CPU: losses that are no number are noticed some steps later.
    config = replace(SMALL, learning_rate=1e30, steps=20, test_every=20)
    trainer = toy.grid.Trainer(config, torch.device("cpu"))
    trainer.watch = 8
    message = r"depth 1 at temperature 0\.1 \(rho 0, teacher 0\) is no number at one of the steps"
    with pytest.raises(FloatingPointError, match=message + " 0 to 7: lower learning_rate"):
        for _ in range(20):
            trainer.advance()


def test_inputs_are_the_same_on_every_device():
    feed = toy.grid.InputBuffer(SMALL, torch.device(DEVICE))
    fed = [feed(step).cpu().clone() for step in range(2 * toy.grid.PREFETCH + 1)]
    for step, x in enumerate(fed):
        assert torch.equal(x, torch.stack([toy.inputs(SMALL, t, step) for t in SMALL.teachers]))


def test_a_checkpoint_knows_nothing_of_the_machine_it_came_from(tmp_path):
    path = tmp_path / "run.pt"
    trainer = toy.grid.Trainer(SMALL, torch.device("cpu"))
    trainer.advance()
    for group in trainer.groups:  # as a GPU leaves it
        group.adam.param_groups[0].update(capturable=True, lr=torch.tensor(1e-3))
    trainer.save(path)
    resumed = toy.train(SMALL, checkpoint=path, device="cpu", kernel="torch")
    whole = toy.train(SMALL, device="cpu", kernel="torch")
    assert resumed.losses.equals(whole.losses)


def test_a_checkpoint_outlives_another_stacking(tmp_path, monkeypatch):
    # A GPU stacks all students of a depth, a CPU as many as its cache holds.
    path, config = tmp_path / "run.pt", replace(SMALL, dtype="float64", test_every=2)
    for steps, cache in ((2, 1), (4, 2**20), (6, 8000)):
        monkeypatch.setattr(toy.grid, "CACHE_BYTES", cache)
        part = replace(config, steps=steps)
        result = toy.train(part, checkpoint=path, device="cpu", students=True)
        count = len(toy.grid.Trainer(part, torch.device("cpu")).groups)
        assert count == {1: 8, 2**20: 2, 8000: 4}[cache]
    monkeypatch.undo()
    for run in (result, toy.ToyResult.from_checkpoint(path, students=True)):
        assert run.losses.shape == (8 * 3, 7)
        for key, weights in toy.train(part, device="cpu", students=True).weights.items():
            for mine, theirs in zip(weights, run.weights[key], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


# Which one is used ----------------------------------------------------------------------


def test_a_cpu_uses_torch_and_says_so(capsys):
    assert kernels.choose("auto", "cpu", precision="tf32") == (kernels.Stack, "torch")
    result = toy.train(replace(SMALL, steps=1), device="cpu", progress=True)
    assert result.kernel == "torch"
    assert capsys.readouterr().err.startswith("computed by torch, on cpu\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "cuda"}, r"kernel is one of \('auto', 'torch', 'triton'\), not 'cuda'"),
        ({"precision": "fp8"}, "precision is one of .* not 'fp8'"),
        ({"kernel": "torch", "precision": "tf32"}, "is one of kernel 'triton', not of 'torch'"),
        ({"kernel": "triton", "dtype": "float64"}, "compute in float32, not float64; 'auto'"),
        ({"kernel": "triton", "width": 100}, "hold widths up to 64, not 100; 'auto'"),
    ],
)
def test_choices_that_cannot_be_had(options, message):
    with pytest.raises(ValueError, match=message):
        kernels.choose(**options)


def test_what_a_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = iter([None])
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: next(found, object()))
    stack, said = kernels.choose("auto", "cuda")
    assert stack is kernels.Stack
    assert said == "torch, because Triton is not installed (pip install triton)"
    stack, said = kernels.choose("auto", "cuda")
    assert said == "torch, because Triton supports GPUs from compute capability 8.0"
    assert kernels.choose("triton", "cuda")[1] == "triton, ieee"
    with pytest.raises(ValueError, match="tf32 needs a GPU of compute capability 8"):
        kernels.choose("triton", "cuda", precision="tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    stack, said = kernels.choose("auto", "cuda", precision="tf32x3")
    assert stack.func is kernels.FusedStack and said == "triton, tf32x3"


@needs_triton
def test_without_a_gpu_or_the_interpreter_there_are_no_kernels(monkeypatch):
    from depthutil.toy import fused

    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"need a GPU with CUDA .* TRITON_INTERPRET=1 set before"):
        toy.train(SMALL, device="cpu", kernel="triton")
    with pytest.raises(ValueError, match="need contiguous weights"):
        monkeypatch.setattr(fused, "INTERPRETED", True)
        kernels.FusedStack(*(w.float().transpose(0, 1) for w in drawn(2, 3, 5, 4, 7, 1)[0]))


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="a CUDA graph needs a GPU, not cpu"):
        toy.train(SMALL, device="cpu", graph=True)


def test_steps_that_cannot_be_recorded_are_launched(monkeypatch):
    # What happens where a GPU refuses, on the CPU.
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    trainers = {}
    for must in (None, True):
        trainers[must] = toy.grid.Trainer(SMALL, torch.device("cpu"))
        trainers[must].graph, trainers[must].must = True, must is True
        trainers[must].advance()
    with pytest.warns(UserWarning, match=r"CUDA graph \(operation not permitted\): each is"):
        trainers[None].advance()
    assert trainers[None].step == 2 and trainers[None].replay is None
    with pytest.raises(RuntimeError, match=r"not permitted\): train with graph=False"):
        trainers[True].advance()


# On a GPU -------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("changes", [{}, {"depth_factor": 2.0, "decay": True}, MSE])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_a_recorded_gpu_equals_the_cpu(kernel, changes):
    config = replace(SMALL, steps=30, test_every=10, **changes)
    cpu = toy.train(config, device="cpu", kernel="torch")
    gpu = toy.train(config, device="cuda", kernel=kernel, graph=True)
    assert gpu.kernel.startswith(kernel) and gpu.kernel.endswith("; CUDA graph")
    losses = [torch.tensor(run.losses["loss"].to_numpy()) for run in (cpu, gpu)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-5)
    launched = toy.train(config, device="cuda", kernel=kernel, graph=False)
    losses[0] = torch.tensor(launched.losses["loss"].to_numpy())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-6)


@needs_gpu
def test_a_gpu_continues_what_a_cpu_began_and_the_other_way_round(tmp_path):
    path, config = tmp_path / "run.pt", replace(SMALL, steps=12)
    whole = toy.train(config, device="cpu")
    for steps, device in ((4, "cpu"), (8, "cuda"), (12, "cpu")):
        result = toy.train(replace(config, steps=steps), checkpoint=path, device=device)
    losses = [torch.tensor(r.losses["loss"].to_numpy()[-4:]) for r in (whole, result)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-5)


@needs_gpu
def test_a_gpu_names_the_student_and_a_range_of_steps():
    config = replace(SMALL, learning_rate=1e30, steps=300, test_every=300)
    with pytest.raises(FloatingPointError, match="is no number at one of the steps 0 to 99"):
        toy.train(config, device="cuda")
