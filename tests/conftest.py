"""What every test file shares: the scripts on the import path, the optional data, processes under torchrun."""
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"            # real pairs and photographs: tests that use them skip without
sys.path.insert(0, str(ROOT))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="real data folder ../shared/data is absent")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too: see README.md")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about a second; only with --all, or -m slow")
    config.addinivalue_line("markers", "soak: takes minutes, or gigabytes; only with -m soak")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Without -m, which decides alone, slow tests wait for --all, and soaks, slow or not, for -m soak."""
    if config.option.markexpr:
        return
    soaks = [item for item in items if item.get_closest_marker("soak")]
    slow = [item for item in items if item.get_closest_marker("slow") and item not in soaks and not config.option.all]
    config.left_out = [f"{len(left)} {words}" for left, words in (
        (slow, "slow tests left out, which take minutes: --all runs them"), (soaks, "soaks left out: -m soak runs them")
    ) if left]
    config.hook.pytest_deselected(items=slow + soaks)
    items[:] = [item for item in items if item not in slow + soaks]


def pytest_terminal_summary(terminalreporter, config):
    for line in getattr(config, "left_out", ()):
        terminalreporter.write_line(line)


def command(*arguments, processes: int = 0) -> list[str]:
    port = 20000 + os.getpid() % 20000
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", f"{processes}", "--master-port", f"{port}"]
    return [sys.executable, *(torchrun if processes else []), *map(str, arguments)]


def start_script(*arguments, processes: int = 0) -> subprocess.Popen:
    """Starts a script of the project as a user would, under torchrun when processes > 0."""
    return subprocess.Popen(command(*arguments, processes=processes), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))


def run_script(*arguments, processes: int = 0, check: int = 0, timeout: int = 300) -> subprocess.CompletedProcess:
    """The same, waiting for its end and for the exit status `check`."""
    return finish_script(start_script(*arguments, processes=processes), check, timeout)


def finish_script(process: subprocess.Popen, check: int = 0, timeout: int = 300) -> subprocess.CompletedProcess:
    """Waits for what start_script started."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == check, f"exit {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def on_processes(function, world: int, folder: Path) -> list:
    """[function(rank, world), ...] of `world` gloo processes in one group; folder is where they meet."""
    torch.multiprocessing.spawn(in_group, (function, world, folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def in_group(rank: int, function, world: int, folder: Path):
    """The group goes when the networks that `function` made are gone: see data.run."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(function(rank, world), folder / f"{rank}.pt")
    gc.collect()
    torch.distributed.destroy_process_group()
