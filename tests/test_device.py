"""Where tensors live, without a GPU: every method and script runs on a pretended one, on real numbers.

Under `pretended_gpu` all is computed on the CPU, but each storage knows where it would live: on "gpu", "cpu",
or there "pinned", as a loader's batches are.  The ledger that it gives notes, with the project's line,

    faults   what would raise on a GPU: tensors of two places in one operation, numpy() of a tensor on the GPU, a CPU
             tensor in a collective of an NCCL group
    waits    what makes the host wait for all that the GPU has been given: values read back (item, tolist, a bool),
             sizes that depend on values (nonzero, a boolean index), copies either way that are not asynchronous

torch counts the same with torch.cuda.set_sync_debug_mode; tests/gpu.py asks it.  What a kernel does inside, other
streams, autocast on a GPU, speed and memory cannot be seen from here.
"""
import contextlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.clip_grad import _group_tensors_by_device_and_dtype as by_device
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import dense
import eval_linear
import eval_zeroshot
import finetune
import train
from conftest import ROOT, run_script
from model import METHODS
from test_train import SMALL, signals_kept

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a build for CUDA asks its driver")


# ---------------------------------------------------------------------------------------------------------------------
# The pretended device
# ---------------------------------------------------------------------------------------------------------------------

def project_line() -> str:
    """Which line of the project's scripts is being run: file:line in function"""
    frame = sys._getframe()
    while frame and (Path(frame.f_code.co_filename).parent != ROOT):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "test"


class Ledger:
    """What was noted, with how often; and after each step of a run the waits so far."""

    def __init__(self):
        self.faults, self.waits, self.steps, self.is_backward = Counter(), Counter(), [], False

    def fault(self, what: str):
        self.faults[f"{project_line()}: {what}"] += 1

    def wait(self, what: str):
        self.waits[f"{project_line()}: {what}"] += 1

    def step(self, number: int) -> Counter:
        """The waits of the step with this number, counted from 0"""
        return self.steps[number + 1] - self.steps[number]

    def place(self, x: Tensor) -> str | None:
        """Where x lives.  What autograd makes of nothing, as zeros for a missing gradient, fits any place: None."""
        return getattr(x.untyped_storage(), "place", None if self.is_backward else "cpu")


def put(x: Tensor, place: str) -> Tensor:
    x.untyped_storage().place = place
    return x


def on_gpu(x) -> bool:
    return isinstance(x, Tensor) and getattr(x.untyped_storage(), "place", None) == "gpu"


# operations whose result has a size that depends on values, or whose result is a value
VALUES_DECIDE = {"_local_scalar_dense": "value read", "nonzero": "nonzero", "masked_select": "masked_select",
                 "equal": "equal", "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique",
                 "bincount": "bincount", "is_nonzero": "bool"}

# functions that ask in C++ where a tensor is, and so make parts of their work on the CPU
SEES_THROUGH = {"one_hot", "pad_sequence"}


class Operations(TorchDispatchMode):
    """Every operation, those of the backward pass too: are its tensors in one place, must the host wait?"""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name, ledger = dict(kwargs or {}), func.overloadpacket.__name__, self.ledger
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = {ledger.place(x) for x in tensors if x.ndim or on_gpu(x)} - {None}
        is_mixed = "gpu" in places and len(places) > 1
        wanted = kwargs.get("device")
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = CPU
        elif wanted is not None and "gpu" in places:
            wanted = GPU                                        # autograd repeats what it was told in forward
        result = "gpu" if "gpu" in places or wanted is not None and wanted.type == "cuda" else "cpu"

        if func.namespace == "c10d":
            if places - {"gpu"} and name != "barrier":
                ledger.fault(f"{name} of a CPU tensor in an NCCL group")
        elif name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            target = result if name == "_to_copy" else ledger.place(args[0])
            is_async = kwargs.get("non_blocking") or name == "copy_" and True in args[2:]
            if target == "gpu" and ledger.place(source) not in ("gpu", None) and not is_async:
                ledger.wait("copy to the GPU")
            if target == "cpu" and on_gpu(source):
                ledger.wait("copy from the GPU")
        elif name in ("index", "index_put", "index_put_", "_unsafe_index"):
            indices = [x for x in args[1] if x is not None]
            if on_gpu(args[0]) and any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                ledger.wait("boolean index")
            if on_gpu(args[0]) and not all(on_gpu(x) for x in indices):
                ledger.wait("index on the CPU")
            if not on_gpu(args[0]) and "gpu" in places:
                ledger.fault(f"{name} of a CPU tensor by one of the GPU")
        elif is_mixed and not name.startswith("_embedding_bag"):        # torch puts the offsets beside the indices
            ledger.fault(f"{name} of tensors on {' and '.join(sorted(places))}")
        elif "gpu" in places and name in VALUES_DECIDE:
            ledger.wait(VALUES_DECIDE[name])
        elif "gpu" in places and name == "repeat_interleave" and kwargs.get("output_size") is None:
            ledger.wait("repeat_interleave")

        returned = func(*args, **kwargs)
        for x in tree_leaves(returned):
            if isinstance(x, Tensor) and not hasattr(x.untyped_storage(), "place"):
                if result == "gpu" or not ledger.is_backward:
                    put(x, result)
        return returned


class Properties(TorchFunctionMode):
    """What is no operation: where a tensor says it is, moving it, its values in Python and numpy."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, ledger, x = dict(kwargs or {}), self.ledger, args[0] if args else None
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if name == "device" and on_gpu(x):
            return GPU
        if name == "is_cuda" and on_gpu(x):
            return True
        if name in ("to", "cpu", "cuda") and isinstance(x, Tensor):
            return self.moved(func, name, args, kwargs)
        if name in ("tensor", "as_tensor", "new_tensor"):
            target = kwargs.get("device")
            if target is not None and torch.device(target).type == "cuda" or name == "new_tensor" and on_gpu(x):
                if not any(on_gpu(part) for part in tree_leaves(args[:1])) or name == "new_tensor":
                    ledger.wait("copy to the GPU")
                return put(func(*args, **dict(kwargs, device=CPU)).clone(), "gpu")
        if name == "pin_memory":
            return put(x.clone(), "pinned")
        if name in ("numpy", "__array__") and on_gpu(x):
            ledger.fault("numpy of a tensor on the GPU")
        if name == "tolist" and on_gpu(x):
            ledger.wait("value read")
        if name in SEES_THROUGH and any(map(on_gpu, tree_leaves(args))):
            faults, waits = ledger.faults.copy(), ledger.waits.copy()
            result = put(func(*args, **kwargs), "gpu")
            ledger.faults, ledger.waits = faults, waits
            return result
        if name in ("backward", "grad", "run_backward"):
            before, ledger.is_backward = ledger.is_backward, True
            try:
                return func(*args, **kwargs)
            finally:
                ledger.is_backward = before
        return func(*args, **kwargs)

    def moved(self, func, name: str, args: tuple, kwargs: dict) -> Tensor:
        """x.to(...), x.cpu(), x.cuda(): computed on the CPU, with a storage of its own where it changes its place"""
        x = args[0]
        named = [y for y in (*args[1:], kwargs.get("device")) if isinstance(y, (torch.device, str))]
        target = torch.device(named[0]).type if named else "any" if name == "to" else name
        rest = [CPU if isinstance(y, (torch.device, str)) else y for y in args[1:]]
        is_async = kwargs.get("non_blocking", False)
        kwargs = {key: CPU if key == "device" else value for key, value in kwargs.items()}
        if target == "cuda" and not on_gpu(x):
            if not is_async:
                self.ledger.wait("copy to the GPU")
            return put((x if name == "cuda" else func(x, *rest, **kwargs)).clone(), "gpu")
        if target == "cpu" and on_gpu(x):
            self.ledger.wait("copy from the GPU")       # even if asynchronous: who reads it must wait
            return put(func(x, *rest, **kwargs).clone(), "cpu")
        return x if name == "cuda" else func(x, *rest, **kwargs)


def as_if_pinned(loader):
    """What a loader gives, as a thread of it pins it"""
    for batch in torch.utils.data.DataLoader.__iter__(loader):
        for value in batch.values():
            if isinstance(value, Tensor):
                put(value, "pinned")
        yield batch


def grouped(tensors, **options):
    """torch's groups of tensors for clipping, with the device that a GPU would give"""
    groups = by_device(tensors, **options)
    return {(GPU if on_gpu(tensors[0][0]) else device, dtype): group for (device, dtype), group in groups.items()}


class AnyGenerator(torch.Generator):
    """A CPU's, where a GPU's is asked for: it draws what the pretended device holds."""

    def __new__(cls, device=None):
        return super().__new__(cls)


@contextlib.contextmanager
def pretended_gpu(processes: int = 1):
    """-> Ledger.  With processes > 1 this is the first of a group, whose collectives leave tensors as they are."""
    ledger, readable = Ledger(), train.Guard.readable

    def marking(guard, batch, step):
        ledger.steps.append(ledger.waits.copy())
        return readable(guard, batch, step)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
                (torch.cuda, "is_available", lambda: True), (torch.cuda, "_lazy_init", lambda: None),
                (torch.cuda, "set_device", lambda device: None), (train.Guard, "readable", marking),
                (data.DataLoader, "__iter__", as_if_pinned), (torch, "Generator", AnyGenerator),
                (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", grouped)):
            stack.enter_context(mock.patch.object(owner, name, value))
        if processes > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            stack.callback(dist.destroy_process_group)
            stack.enter_context(mock.patch.dict(os.environ, WORLD_SIZE=str(processes)))
            # torch's own, which move to the device what they are given
            stack.enter_context(mock.patch.object(train, "gather_objects", lambda x, runtime: [x] * processes))
            stack.enter_context(mock.patch.object(train, "wrap", lambda core, runtime: core))
        stack.enter_context(signals_kept())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(Operations(ledger))
        stack.enter_context(Properties(ledger))
        yield ledger
        ledger.steps.append(ledger.waits.copy())


# ---------------------------------------------------------------------------------------------------------------------
# It sees what it should
# ---------------------------------------------------------------------------------------------------------------------

def moved(shape=(4,)):
    return torch.ones(shape).to("cuda")


@pytest.mark.parametrize("do, faults, waits", [
    (lambda: moved() + moved(), 0, 2),                                          # two blocking copies to the GPU
    (lambda: moved() + torch.ones(4), 1, 1),
    (lambda: moved() * torch.tensor(2.0), 0, 1),                                # a scalar of the CPU may take part
    (lambda: torch.ones(4) * moved(()), 1, 1),                                  # one of the GPU may not
    (lambda: torch.ones(4, device="cuda") + torch.arange(4, device="cuda"), 0, 0),
    (lambda: torch.tensor([1.0], device="cuda"), 0, 1),
    (lambda: moved().new_tensor(1.0) + moved(), 0, 3),
    (lambda: torch.ones(4, device=moved().device), 0, 1),
    (lambda: torch.ones(4).pin_memory().to("cuda", non_blocking=True), 0, 0),
    (lambda: moved().numpy(), 1, 1),
    (lambda: moved().cpu().numpy(), 0, 2),
    (lambda: moved().to("cpu").numpy(), 0, 2),
    (lambda: moved().to("cuda", torch.float64), 0, 1),                          # there already
    (lambda: moved()[0].item(), 0, 2),
    (lambda: moved().tolist(), 0, 2),
    (lambda: bool(moved().any()), 0, 2),
    (lambda: moved()[moved() > 0], 0, 3),
    (lambda: moved()[torch.tensor([0])], 0, 2),
    (lambda: torch.ones(4)[moved().long()], 1, 1),
    (lambda: moved().nonzero(), 0, 2),
    (lambda: torch.zeros(4, device="cuda").copy_(torch.ones(4)), 0, 1),
    (lambda: torch.nn.functional.one_hot(moved().long(), 3), 0, 1),
])
def test_what_the_pretended_device_notes(do, faults, waits):
    with pretended_gpu() as ledger:
        do()
    assert (ledger.faults.total(), ledger.waits.total()) == (faults, waits), (ledger.faults, ledger.waits)


def test_it_follows_the_backward_pass_and_collectives():
    with pretended_gpu(processes=2) as ledger:
        weight, x = moved((3, 3)).requires_grad_(), moved((2, 3))
        (x @ weight).square().sum().backward()
        assert weight.grad.device == GPU and not ledger.faults
        dist.all_reduce(weight.grad)
        assert not ledger.faults
        dist.all_reduce(torch.ones(2))
    assert list(ledger.faults) == ["test: allreduce_ of a CPU tensor in an NCCL group"]


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------------------------------

def pretrain(method: str, out: Path, *more, processes: int = 1) -> Ledger:
    """Three steps, of which the last is logged"""
    words = [*SMALL[1:], "--method", method, "--batch-size", 8, "--steps", 3, "--log-every", 9, "--slip-hidden", 32,
             "--simsiam-hidden", 32, "--token-dim", 16, "--queue-size", 64, "--vocab-size", 600,
             "--device", "cuda", "--precision", "fp32",
             "--out", out, *more]
    options = train.parse_train_options([str(word) for word in words])
    with pretended_gpu(processes) as ledger:
        train.train(options)
    return ledger


# Waits of a step: the look at whether all is finite (Guard.accepts)
WAITS = dict.fromkeys(METHODS, 1)
# on several processes FILIP asks all for their longest caption, and copies its own length for it, DeFILIP four times
MORE_WAITS = {"filip": 2, "defilip": 8}


def check_run(ledger: Ledger, most: int):
    assert not ledger.faults, ledger.faults
    assert ledger.step(1).total() <= most, ledger.step(1)


def test_maskclip_on_a_pretended_gpu(tmp_path):
    """With its log, its checkpoint, its pictures and its accuracy, and a second run that goes on from it."""
    check_run(pretrain("maskclip", tmp_path), WAITS["maskclip"])
    assert (tmp_path / "step.png").exists() and (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("method", [pytest.param(name, marks=[] if name == "filip" else pytest.mark.slow)
                                    for name in METHODS])
@pytest.mark.parametrize("accumulate, processes", [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow),
                                                   pytest.param(1, 1, marks=pytest.mark.slow)])
def test_method_on_a_pretended_gpu(method, accumulate, processes, tmp_path):
    most = WAITS[method] + MORE_WAITS.get(method, 0) * (processes > 1)
    with mock.patch.object(train, "finish"):
        check_run(pretrain(method, tmp_path, "--accumulate", accumulate, processes=processes), most)


@pytest.mark.slow
def test_a_run_goes_on_on_a_pretended_gpu(tmp_path):
    with mock.patch.object(train, "finish"):
        assert pretrain("maskclip", tmp_path, "--checkpoint-every", 0, "--eval-every", 0.04).faults == {}
        state = train.load_state(tmp_path / "last.pt")
        train.save_atomically(tmp_path / "last.pt", dict(state, step=1))
        ledger = pretrain("maskclip", tmp_path, "--checkpoint-every", 0, "--eval-every", 0.04)
    assert ledger.faults == {} and len(ledger.steps) == 3, "two steps were left"


# ---------------------------------------------------------------------------------------------------------------------
# The other scripts
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    with mock.patch.object(train, "finish"), signals_kept():
        words = [*SMALL[1:], "--batch-size", 8, "--steps", 1, "--out", out, "--device", "cpu", "--precision", "fp32"]
        train.train(train.parse_train_options([str(word) for word in words]))
    return out / "last.pt"


ON_GPU = ["--device", "cuda", "--precision", "fp32", "--workers", "0"]
FEW_STEPS = ["--batch-size", 2, "--steps", 3, "--log-every", 9]
# script, its words, and the most waits of a step where it trains
SCRIPTS = [
    (eval_zeroshot, ["--data", "shapes:val=24"], None),
    (eval_zeroshot, ["--data", "shapes:val=24", "--task", "retrieval"], None),
    (eval_linear, ["--data", "shapes:train=64,val=16", "--epochs", 2], None),
    (eval_linear, ["--data", "shapes:train=64,val=16", "--epochs", 2, "--augment"], None),
    # a step copies images and labels asynchronously, and waits for the share of each pixel when mixing
    (finetune, ["--data", "shapes:objects=1-1,train=24,val=8", "--batch-size", 8, "--epochs", 1, "--log-every", 9,
                "--mixup", 0.8, "--cutmix", 1.0, "--erasing", 0.25], 2),
    (dense, ["zeroshot", "--data", "shapes:objects=2-4,val=2"], None),
    (dense, ["words", "--data", "shapes:val=4", "--samples", 2], None),
    (dense, ["upernet", "--data", "shapes:train=6,val=2", *FEW_STEPS, "--channels", 16, "--aux-channels", 8], 1),
    # the largest image of all processes; what is drawn, two kinds for the RPN and two for the heads; NMS, how many
    # boxes and which; RoIAlign, for boxes, masks and true masks; and whether all is finite: whatever the batch
    *[(dense, ["maskrcnn", "--data", "shapes:objects=2-4,train=20,val=2", *FEW_STEPS, "--batch-size", batch_size,
               "--channels", 16, "--head-width", 16, "--short-side", 64], 11) for batch_size in (1, 2, 5)],
]


@pytest.mark.slow
@pytest.mark.parametrize("script, words, most", SCRIPTS)
def test_script_on_a_pretended_gpu(script, words, most, checkpoint, tmp_path):
    named = [words[0], checkpoint, *words[1:]] if script is dense else [checkpoint, *words]
    with pretended_gpu() as ledger:
        script.main([str(word) for word in (*named, *ON_GPU, "--out", tmp_path)])
    assert not ledger.faults, ledger.faults
    if most is not None:
        check_run(ledger, most)


# ---------------------------------------------------------------------------------------------------------------------
# The script for a real one
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_script_for_a_real_gpu_runs_in_miniature(tmp_path):
    run_script("tests/gpu.py", "--dry", "--out", tmp_path, timeout=400)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found) == 11 and all(len(rows) > 1 for rows in found.values())
    wrong = [(part, row) for part, rows in found.items() for row in rows if row["is_fine"] is False]
    assert not wrong, wrong


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_is_a_line(monkeypatch, tmp_path):
    import gpu

    def failing(s):
        yield gpu.Row("first", "1")
        raise ValueError("broken")

    def endless(s):
        yield gpu.Row("first", "1")
        time.sleep(60)
    monkeypatch.setattr(gpu, "PARTS", dict(failing=(failing, 9), endless=(endless, 9)))
    assert [row.value for row in gpu.run_part("failing", True, tmp_path, 9)][:2] == ["1", "ValueError: broken"]
    assert [row.value for row in gpu.run_part("endless", True, tmp_path, 0.5)][:2] == ["1", "its 0 s were over"]
