"""Pre-training from top to bottom, and the small runtime that all scripts share.

    torchrun train.py                                       preset pocket on the embedded Shapes world: minutes on a CPU
    torchrun train.py --preset vit-b16-yfcc15m --batch-size 64 --data "shards:yfcc/{00000..01499}.tar" --bpe MERGES
    torchrun --nnodes 4 --nproc-per-node 8 ... train.py --preset vit-b16-yfcc15m --data ... --bpe ...   the paper's run

One step, in the order of `train`:  schedules; masks; teacher without gradient; all branches in one forward; backward;
clip; is all finite?; now and then save; optimizer; clamp the logit scale; teacher <- average, its centre; log.
Every random choice is a function of (seed, step) and of the row in the global batch, never of the process, so a run can
be stopped anywhere and go on, on another number of processes too.
"""
import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, fields
from pathlib import Path

PARENT = os.getppid()           # asked before the imports below, which take seconds: see StopSignal

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.distributed as dist
import torch.distributed.nn     # before init_process_group: its functions keep the group of their import as a default
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data as data_module
from data import BytePairTokenizer, UserError, say
from losses import mean_over_processes, similarity, total_loss
from model import (METHODS, PRESETS, Config, DeCLIP, MaskCLIP, Teacher, build, costs, initialize, mask_words,
                   momentum_at, opt, preset_for, random_mask, read_merges, step_flops, step_memory, step_traffic)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class RunOptions:
    """What every script takes."""
    data: tuple = opt(("shapes",), "data set, may be given more than once: shapes, shards:A-{000..999}.tar, csv:FILE, "
                      "folder:DIR, coco:DIR, flickr30k:DIR; for evaluation also icinw:DIR, ade20k:DIR, "
                      "pascal-context:DIR, coco-stuff:DIR, voc:DIR (docs/DATA.md)", "run")
    out: str = opt("", "folder for everything that is written; empty: one below runs/, or that of the checkpoint",
                   "run")
    seed: int = opt(0, "seed of every random choice", "run")
    device: str = opt("auto", "where to compute", "run", ("auto", "cpu", "cuda", "mps"))
    precision: str = opt("auto", "auto: bf16 where the hardware multiplies it natively", "run",
                         ("auto", "fp32", "bf16"))
    workers: int = opt(-1, "loader processes a process, -1: none on CPU, up to 8 on GPU", "run")


@dataclass
class TrainOptions(RunOptions, Config):
    """RunOptions, the fields of model.Config, and what a pre-training run needs besides."""
    preset: str = opt("pocket", "model and recipe that the other options change", "what", tuple(PRESETS))
    bpe: str = opt("", "CLIP's merges file; empty: learn vocab_size entries from the captions", "run")
    synonyms: str = opt("", "DeCLIP's second caption: file with a group of words a line, divided by commas", "run")
    steps: int = opt(0, "length in steps instead of --epochs, 0: use --epochs", "run")
    resume: str = opt("auto", "auto: go on from OUT/last.pt if there; none: start over; or a checkpoint's path", "run")
    accumulate: int = opt(1, "micro-batches a step; gradients are those of the whole batch, contrast included", "run")
    checkpoint_every: float = opt(300.0, "seconds between checkpoints", "run")
    log_every: int = opt(20, "steps between lines of metrics.jsonl", "run")
    compile: bool = opt(False, "torch.compile the model: faster after minutes of compiling, worth it on GPUs", "run")
    max_bad: float = opt(0.05, "stop when more than this share of the records read is bad", "run")
    plan: bool = opt(False, "train nothing: print what the run would cost on --gpus", "plan")
    gpus: int = opt(8, "devices to plan for", "plan")
    gpu: str = opt("h100", "their kind", "plan", ("h200", "h100", "a100", "a100-40gb", "l40s", "4090", "v100"))
    pairs: int = opt(15_000_000, "pairs of the data to plan for (YFCC15M's)", "plan")
    utilization: float = opt(0.4, "share of the peak that is assumed to be reached (a guess, measure yours)", "plan")


# fields in which a resumed run may differ from the interrupted one: they change neither the data nor what is computed,
# only where, in which parts and how exactly
FREE_TO_CHANGE = {"out", "device", "precision", "workers", "resume", "accumulate", "checkpoint_every", "log_every",
                  "compile", "max_bad", "bpe", "json", "eval", "draw", "limit", "fit", "plan", "gpus", "gpu", "pairs",
                  "utilization"}


METAVARS = {int: "N", float: "X", str: "TEXT"}

# Numbers are finite and not negative; the least and most of those that want more, by the option's name in any script.
# What stands as a default is fine too: there 0 may mean "as the paper".
LIMITS = dict(
    dict.fromkeys(("batch_size", "accumulate", "log_every", "gpus", "image_size", "patch_size", "width", "depth",
                   "heads", "text_width", "text_depth", "text_heads", "context_length", "vocab_size", "embed_dim",
                   "n_codes", "quantizer_hidden", "quantizer_bottleneck", "slip_hidden", "simsiam_hidden", "token_dim",
                   "queue_size", "channels", "aux_channels", "head_width", "crop", "short_side", "long_side", "samples",
                   "rpn_samples", "roi_samples", "rpn_before_train", "rpn_before_test", "rpn_keep_train",
                   "rpn_keep_test"), (1, math.inf)),
    **dict.fromkeys(("word_ratio", "center_momentum", "momentum", "momentum_end", "max_bad", "erasing", "smoothing",
                     "temp_t_warmup", "layer_decay", "score_threshold"), (0, 1)),
    **dict.fromkeys(("mask_ratio", "drop_path"), (0, 0.99)),
    **dict.fromkeys(("crop_min", "view_crop_min"), (0.01, 1)),
    workers=(-1, math.inf), seed=(0, 2 ** 31 - 1), beta2=(0, 0.99999), randaugment=(0, 10), crop_share=(0.1, 1),
    utilization=(0, 1))
ABOVE_0 = {"epochs", "temp_s", "temp_t", "temp_t_start", "utilization", "eps"}


def check_number(name: str, value: float):
    least, most = LIMITS.get(name, (0, math.inf))
    if not (math.isfinite(value) and least <= value <= most) or name in ABOVE_0 and not value:
        raise UserError(f"--{name.replace('_', '-')} must be a number {'above' if name in ABOVE_0 else 'from'} {least}"
                        + (f" to {most}" if most < math.inf else " up" * (name not in ABOVE_0)) + f", not {value}")


def parse(cls, doc: str, argv=None, positional: tuple[str, ...] = (), defaults=None, own: str = ""):
    """The command line as an instance of dataclass cls: one --flag a field, --help with the field's group and text.

    positional fields may stand without a flag.  `defaults` (an instance) replaces the class's own defaults, which
    --help shows too if `own` says what they are called.
    """
    usage = " ".join(["%(prog)s", *(f"[{name.upper()}]" for name in positional), "[options]"])
    cli = argparse.ArgumentParser(usage=usage, description=doc, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {"what": cli.add_argument_group("what")}
    for f in fields(cls):
        default = getattr(defaults, f.name) if defaults else f.default
        name = f.metadata["group"]
        group = groups.setdefault(name, cli.add_argument_group(name))
        help = f.metadata["help"].replace("%", "%%")
        if f.name in positional:
            group.add_argument(f.name, nargs="?", default=default, help=f"{help} (default: {default or 'none'})")
            continue
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(action="append", metavar="SPEC") if f.type is tuple else
                dict(type=f.type, choices=f.metadata["choices"],
                     metavar=None if f.metadata["choices"] else METAVARS[f.type]))
        shown = ", ".join(default) if f.type is tuple else "none" if default == "" else default
        shown = f"{shown}; {own}: {f.default}" if own and default != f.default else shown
        group.add_argument("--" + f.name.replace("_", "-"), default=None, help=f"{help} (default: {shown})", **kind)
    given = vars(cli.parse_args(argv))
    values = {f.name: getattr(defaults, f.name) if defaults else f.default for f in fields(cls)}
    values.update({name: tuple(value) if isinstance(value, list) else value
                   for name, value in given.items() if value is not None})
    for f in fields(cls):
        if f.type in (int, float) and values[f.name] != f.default:
            check_number(f.name, values[f.name])
    return cls(**values)


def first_look(cls, argv, *names: str) -> argparse.Namespace:
    """What the command line says of these fields of cls: they decide what the defaults of the others are."""
    cli = argparse.ArgumentParser(usage="%(prog)s [options]", add_help=False, allow_abbrev=False)
    for f in fields(cls):
        if f.name in names:
            kind = {"action": "store_true"} if f.type is bool else {"choices": f.metadata["choices"]}
            cli.add_argument("--" + f.name, default=f.default, **kind)
    return cli.parse_known_args(argv)[0]


def parse_train_options(argv=None) -> TrainOptions:
    """The command line over the preset and the method it names."""
    chosen = first_look(TrainOptions, argv, "preset", "method")
    defaults = TrainOptions(**asdict(preset_for(chosen.preset, chosen.method)), preset=chosen.preset)
    defaults.pairs = {"pocket": 20_000, "vit-b16-cc3m": 3_000_000}.get(chosen.preset, defaults.pairs)
    options = parse(TrainOptions, __doc__, argv, defaults=defaults, own="vit-b16-yfcc15m")
    options.out = options.out or f"runs/{options.preset}"
    check_options(options)
    return options


def check_options(o: TrainOptions):
    if o.method not in METHODS:
        raise UserError(f"--method {o.method} is unknown; choose one of {', '.join(METHODS)}")
    if o.init not in ("mae", "mimetic") and not o.init.startswith(("timm:", "open_clip:")):
        raise UserError(f"--init {o.init} is unknown; choose mae, mimetic, timm:FILE or open_clip:DIR")
    if o.image_size % o.patch_size:
        raise UserError(f"--image-size {o.image_size} is no multiple of --patch-size {o.patch_size}")
    for width, heads in ((o.width, o.heads), (o.text_width, o.text_heads)):
        if width % heads:
            raise UserError(f"width {width} cannot be cut into {heads} attention heads: choose a divisor of {width}")


def run(main):
    """main(), with a user's mistake told in one line and exit status 2, and no traceback.

    What main() made must be gone before the process group goes: a DistributedDataParallel that is freed later waits for
    gloo's threads, and they for it.
    """
    sys.stdout.reconfigure(errors="backslashreplace")       # names from files may hold what a terminal cannot show
    status = 0
    try:
        main()
    except UserError as error:
        say(f"error: {data_module.printable(str(error))}", file=sys.stderr)
        status = 2
    except BrokenPipeError:                                 # train.py --plan | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except SystemExit as stop:
        status = stop.code
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, precision
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Runtime:
    """This process among all, and where it computes."""
    rank: int
    world: int
    device: torch.device
    bf16: bool
    workers: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def share(self, batch_size: int) -> int:
        """This process's rows of a global batch."""
        if batch_size % self.world:
            raise UserError(f"--batch-size {batch_size} cannot be shared by {self.world} processes: "
                            f"choose a multiple of {self.world}")
        return batch_size // self.world

    def claim(self, out: Path, patience: float = 60.0):
        """Makes the folder, and holds it against a second run until this process ends, however it ends.

        The workers of a torchrun that was killed need a moment to notice, so a new run waits for them.
        """
        if self.is_main:
            try:
                out.mkdir(parents=True, exist_ok=True)
                self.lock = open(out / "lock", "w")         # stays open: the lock goes with the process
            except OSError as error:
                raise UserError(f"cannot write to {out}: {error.strerror}") from None
            started = time.monotonic()
            while is_locked(self.lock):
                if time.monotonic() - started > patience:
                    raise UserError(f"another run is writing to {out}: wait for its end, or choose another --out")
                time.sleep(0.2)
        if self.world > 1:
            dist.barrier()                                  # nobody reads last.pt before the old run is gone

    def check_alike(self, **mine):
        """All processes must begin with the same; the first thing that differs is named."""
        for other in gather(mine, self):
            for name in mine:
                if mine[name] != other[name]:
                    raise UserError(f"processes differ in {name.replace('_', ' ')}: {mine[name]} here, {other[name]} "
                                    f"elsewhere; --out and --data must be on a disk that all machines share")


def is_locked(file) -> bool:
    """Whether another process holds this file; if not, we do from now on."""
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):                          # Windows, or a disk without locks
        pass
    return False


def setup(options: RunOptions) -> Runtime:
    """Reads what torchrun set, joins the process group, chooses device and precision, seeds."""
    data_module.check_folder_of("--json", getattr(options, "json", ""))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {kind}: this machine or this build of torch has none; use --device auto")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if kind == "cpu" and local_world > 1:
        torch.set_num_threads(max(1, cores // local_world))
    workers = options.workers
    if workers < 0:
        workers = min(8, max(1, cores // local_world - 1)) if kind == "cuda" else 0
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store_of_this_attempt(world, local_world),
                                rank=rank, world_size=world)
    torch.manual_seed(options.seed)
    bf16 = options.precision == "bf16" or options.precision == "auto" and multiplies_bf16(device)
    return Runtime(rank, world, device, bf16, workers)


def store_of_this_attempt(world: int, local_world: int) -> dist.Store | None:
    """Where workers find each other, or None: as torch does it.

    torchrun keeps the addresses that workers left, so after --max-restarts new ones may call dead ones (PyTorch issue
    135712).  On one machine each attempt has names of its own; on several, attempts are not counted alike: there set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world != local_world:
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix units; elsewhere bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        return device.type == "cpu" and "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and optimizer
# ---------------------------------------------------------------------------------------------------------------------

def cosine_schedule(step: int, total: int, warmup: int, peak: float, final: float, start: float = 0.0) -> float:
    """Learning rate of step 0 ... total-1: linear from start to peak in `warmup` steps, then half a cosine to final."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    t = (step - warmup) / max(total - 1 - warmup, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(t, 1.0)))


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; biases, norms, tokens, positions and the logit scale do not."""
    return parameter.ndim >= 2 and not any(word in name for word in ("cls_token", "mask_token", "pos_embed"))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [dict(params=[p for name, p in trained if decays(name, p)], weight_decay=weight_decay),
            dict(params=[p for name, p in trained if not decays(name, p)], weight_decay=0.0)]


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups for a module that holds one vision transformer: the lower a layer, the slower it learns (BEiT).

    The transformer is what has the parameter cls_token: the module itself, or its part "visual.", "backbone." ...
        layer 0        class token, positions, patch embedding, norm before blocks   lr * layer_decay ** (N + 1)
        layer i + 1    block i of its N blocks                                       lr * layer_decay ** (N - i)
        layer N + 1    everything else, inside or outside: norms, pyramids, heads    lr
    Matrices have weight_decay, vectors, class token and positions none.  Frozen parameters are left out.
    Groups {"params", "lr", "lr_scale", "weight_decay"}: a schedule sets group["lr"] = lr_now * group["lr_scale"].
    """
    names = [name for name, _ in model.named_parameters()]
    towers = [name.removesuffix("cls_token") for name in names if name.split(".")[-1] == "cls_token"]
    if len(towers) != 1:
        raise ValueError(f"want a module with one vision transformer, got {len(towers)} parameters named cls_token")
    stem = tuple(towers[0] + part for part in ("cls_token", "pos_embed", "patch_embed.", "norm_pre."))
    block = re.compile(re.escape(towers[0]) + r"blocks\.(\d+)\.")
    last = 1 + len({found[1] for name in names if (found := block.match(name))})               # N + 1
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = block.match(name)
            layer = 0 if name.startswith(stem) else int(found[1]) + 1 if found else last
            scale, decay = layer_decay ** (last - layer), weight_decay if decays(name, parameter) else 0.0
            new = dict(params=[], lr=lr * scale, lr_scale=scale, weight_decay=decay)
            groups.setdefault((layer, decays(name, parameter)), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def save_atomically(path: Path, state: dict) -> bool:
    """Writes state to path so that a whole file stands there at any moment.  A full disk is told, not raised: False."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError) as error:        # torch reports a failed write as RuntimeError
        reason = str(error).splitlines()[0]
        say(f"warning: {path} was not saved ({reason}); the one before it stays, and training goes on",
            file=sys.stderr)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False


def load_state(path: str | Path, device="cpu") -> dict:
    """The dict that save_atomically wrote.  Never runs code from the file; rubbish is a UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; make one with: torchrun train.py")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
            pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a whole checkpoint of this project ({type(error).__name__}): "
                        f"train again, or name another file") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint of this project")
    return state


def save_checkpoint(path: str | Path, model: MaskCLIP, tokenizer: BytePairTokenizer, options, **more) -> bool:
    """Everything needed to resume and to evaluate with no other file; `more` holds optimizer, step, teacher ..."""
    return save_atomically(Path(path), dict(
        kind="pretraining", config=asdict(options), model=model.state_dict(), tokenizer=tokenizer.state(),
        mean=list(data_module.MEAN), std=list(data_module.STD), torch=str(torch.__version__), **more))


def config_of(state: dict, path: str | Path) -> Config:
    if state.get("kind", "pretraining") != "pretraining":
        raise UserError(f"{path} holds a {state['kind']} run: wanted what train.py wrote, as runs/pocket/last.pt")
    try:
        known = {f.name for f in fields(Config)}
        config = Config(**{name: value for name, value in state["config"].items() if name in known})
        if config.method not in METHODS:
            raise UserError(f"{path} was trained with method {config.method}, which this version does not know")
        return config
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no pre-training checkpoint: it holds no config") from None


def load_checkpoint(path: str | Path, device="cpu") -> tuple[MaskCLIP, BytePairTokenizer, Config]:
    """(model in eval mode, tokenizer, config) from OUT/last.pt of train.py.  Strict: every weight must be there."""
    state = load_state(path)
    config = config_of(state, path)
    try:
        tokenizer = BytePairTokenizer.from_state(state["tokenizer"])
        check_sizes(config, tokenizer.eot, state["model"], Path(path).stat().st_size)
        model = build(config, tokenizer.eot)
        model.load_state_dict(state["model"])
        pixels = list(state["mean"]), list(state["std"])
    except Exception as error:                  # of a damaged or hostile file, whatever stumbles over it
        raise UserError(f"{path} does not fit its own config: {data_module.one_line(error)}") from None
    if pixels != (list(data_module.MEAN), list(data_module.STD)):
        raise UserError(f"{path} was trained with pixel normalization {state['mean']}, {state['std']}; "
                        f"this version uses {data_module.MEAN}, {data_module.STD}")
    return model.to(device).eval(), tokenizer, config


def check_sizes(config: Config, eot: int, weights: dict[str, Tensor], file_size: int):
    """ValueError if the config asks for other weights than there are, before memory is taken for what it asks."""
    if sum(value.numel() * value.element_size() for value in weights.values()) > file_size:
        raise ValueError("the weights claim to be larger than the file")
    if config.depth + config.text_depth > len(weights):
        raise ValueError(f"{config.depth} and {config.text_depth} blocks, but only {len(weights)} weights")
    with torch.device("meta"):
        wanted = build(config, eot).state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        said, there = (tuple(x[name].shape) if name in x else "nothing" for x in (wanted, weights))
        if said != there:
            raise ValueError(f"{name} should be {said}, the file has {there}")


def find_resumable(options, out: Path, kind: str = "pretraining") -> dict | None:
    """The state to go on from, or None.  Another run in the same folder is never overwritten."""
    paths = [out / "last.pt"] if (out / "last.pt").exists() else []
    paths += [Path(options.resume)] if options.resume not in ("auto", "none") else []
    state = None
    for path in paths:
        state = load_state(path)
        parts = dict(step=int, bad_count=int, config=dict, model=dict, optimizer=dict, data=str)
        if state.get("kind") != kind or not all(isinstance(state.get(name), parts[name]) for name in parts):
            raise UserError(f"{path} is no {kind} checkpoint: choose another --out")
        for name, value in asdict(options).items():
            if name not in FREE_TO_CHANGE and state["config"].get(name) != value:
                raise UserError(f"{path} is of a run with {name} = {state['config'].get(name)}, this one has {value}: "
                                f"choose another --out, or remove that folder")
    return None if options.resume == "none" else state


def load_resumed(load, part: dict, out: Path):
    try:
        load(part)
    except Exception as error:                  # of a damaged or hostile file, whatever stumbles over it
        raise UserError(f"{out}/last.pt does not fit its own config: {data_module.one_line(error)}") from None


def check_same_data(state: dict, identity: str, out: Path):
    """A run goes on only with the records it began with."""
    if state["data"] != identity:
        raise UserError(f"{out} holds a run on other data (sample hash {str(state['data'])[:12]}, now {identity[:12]}"
                        f"): choose another --out")


# ---------------------------------------------------------------------------------------------------------------------
# Log
# ---------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def tell_if_full(path: Path):
    """A disk that is full costs lines of a log, not the run."""
    try:
        yield
    except OSError as error:
        say(f"warning: {path} could not be written ({error.strerror}); training goes on", file=sys.stderr)


class Log:
    """metrics.jsonl, one object a line, and the progress line with rate and time left; by the main process only."""

    def __init__(self, out: Path, is_main: bool, total: int, samples_per_step: int, first_step: int = 0):
        self.path, self.is_main, self.total, self.samples = out / "metrics.jsonl", is_main, total, samples_per_step
        self.started, self.at = time.monotonic(), first_step
        self.begun = self.spoken = self.started
        if is_main:
            # lines beyond the checkpoint we go on from will be written again
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first_step]
            with tell_if_full(self.path):
                write_text_atomically(self.path, "".join(line + "\n" for line in kept))
        self.board = None
        with contextlib.suppress(ImportError):          # TensorBoard, where it is installed
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step) if is_main else None

    def line(self, step: int, values: dict[str, float]):
        """After `step` (counted from 0) is done."""
        rate, rest = self.rate(step)
        self.started, self.at = time.monotonic(), step + 1
        if not self.is_main:
            return
        values = dict(step=step, **values, samples_per_second=rate)
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with tell_if_full(self.path), open(self.path, "a") as file:
            file.write(json.dumps(rounded) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        terms = "  ".join(f"{k} {values[k]:.3f}" for k in ("loss", *TERMS, "code_entropy") if k in values)
        say(f"step {step + 1}/{self.total}  {terms}  lr {values['lr']:.2e}  {rest}")
        self.spoken = time.monotonic()

    def pulse(self, step: int):
        """After a step without a line: a short one, if nothing was said for five seconds, later on for up to a minute."""
        now = time.monotonic()
        if self.is_main and now - self.spoken > min(60, max(5, (now - self.begun) / 20)):
            say(f"step {step + 1}/{self.total}  {self.rate(step)[1]}")
            self.spoken = now

    def rate(self, step: int) -> tuple[float, str]:
        """Samples a second since the last line, and in words with the time left."""
        rate = (step + 1 - self.at) * self.samples / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - step - 1) * self.samples / rate
        return rate, f"{rate:.{int(rate < 10)}f}/s  {duration(left)} left"


def draw_curves(log: Path, path: Path, columns: int = 4, width: int = 400, height: int = 240):
    """metrics.jsonl as a picture: a panel for each number against the step, gray as logged, blue its running mean.

    A mean is over a twentieth of the run at most, and over as many lines before as after, so that slopes stay.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for name in lines[-1] if name not in ("step", "epoch", "samples_per_second")]
    sheet = PIL.Image.new("RGB", (columns * width, -(-len(names) // columns) * height), "white")
    pen, font, last = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(13), lines[-1]["step"] + 1
    for k, name in enumerate(names):
        points = [(line["step"] + 1, line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
        if not points:
            continue
        values, n = [value for _, value in points], len(points)
        half = [min(i, n - 1 - i, n // 40) for i in range(n)]
        means = [sum(values[i - h:i + h + 1]) / (2 * h + 1) for i, h in enumerate(half)]
        usual = sorted(values)[n // 50:n - n // 50] + means             # the rarest fiftieth may leave the panel
        low, high = min(usual), max(usual)
        low, high = (low, high) if high > low else (low - abs(low) - 1e-9, high + abs(high) + 1e-9)
        left, top = k % columns * width + 68, k // columns * height + 30
        right, bottom = left + width - 90, top + height - 62

        def place(step, value):
            share = (min(max(value, low), high) - low) / (high - low)
            return left + (right - left) * step / last, bottom - (bottom - top) * share
        for tick in ticks(low, high):
            y = place(0, tick)[1]
            pen.line([left, y, right, y], "#dddddd")
            pen.text((left - 6, y), f"{tick:.6g}", "#444444", font, anchor="rm")
        for tick in ticks(0, last):
            pen.text((place(tick, low)[0], bottom + 6), f"{tick:.6g}", "#444444", font, anchor="mt")
        pen.text((right, bottom + 20), "step", "#444444", font, anchor="rt")
        pen.text((left, top - 8), f"{name}   last {means[-1]:.4g}", "black", font, anchor="ls")
        pen.line([place(*point) for point in points], "#b8b8b8")
        pen.line([place(step, mean) for (step, _), mean in zip(points, means)], "#1f5fbf", 2)
        pen.rectangle([left, top, right, bottom], outline="#888888")
    sheet.save(path)


def show_curves(out: Path):
    """OUT/curves.png of what a finished run logged."""
    try:
        draw_curves(out / "metrics.jsonl", out / "curves.png")
        say(f"curves: {out}/curves.png")
    except Exception as error:                          # a picture is not worth a finished run
        say(f"warning: no curves.png: {data_module.one_line(error)}", file=sys.stderr)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart, three to six of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    apart = max(power * m for m in (1, 2, 5) if power * m <= (high - low) / 3 * (1 + 1e-9))
    return [i * apart for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


TERMS = ("contrastive", "distillation", "feature", "pixel", "mlm", "simclr", "token", "neighbor", "simsiam")


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'"""
    minutes, s = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"


class StopSignal:
    """SIGTERM or SIGINT: the current step is finished and saved, then the program ends with 128 + signal.

    A worker whose torchrun was killed stops in the same way: else it would train on beside the run that follows.
    """
    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 5:         # not torchrun's echo of a signal that Slurm sent to us too
            sys.exit(128 + number)                      # asked twice: at once

    @property
    def is_set(self) -> bool:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT and not self.number:
            self.note(signal.SIGTERM, None)
        return self.number > 0


# ---------------------------------------------------------------------------------------------------------------------
# Features of a whole data set, shared out over the processes
# ---------------------------------------------------------------------------------------------------------------------

class ReadRecord:
    """A record -> what `extract` needs of it."""

    def __init__(self, image):
        self.image = image              # transform(PIL image, rng) -> uint8 (3, H, W)

    def __call__(self, sample, rng) -> dict:
        return dict(images=self.image(sample.image, rng), label=sample.label, captions=sample.captions)


def gather(mine: object, runtime: Runtime) -> list:
    """Each process's object, in rank order, on all of them."""
    everyone = [mine] * runtime.world
    if runtime.world > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


@torch.no_grad()
def extract(data, transform, encode, runtime: Runtime, batch_size: int) -> dict:
    """encode(images) of each readable record, once and in order; all processes get the same dict:

    features (n, D)   index (n,) of the record   label (n,), -1 unknown   captions [n tuples]   bad [(name, reason)]
    """
    loader = data_module.eval_loader(data, ReadRecord(transform), max(1, batch_size // runtime.world),
                                     runtime.rank, runtime.world, runtime.workers)
    features, index, label, captions, bad = [], [], [], [], []
    for batch in data_module.progress(loader, len(loader), "batches of images", runtime.is_main):
        bad += batch["bad"]
        if "index" in batch:
            with runtime.autocast():
                x = encode(data_module.normalize(batch["images"].to(runtime.device)))              # (B, D)
            features.append(x.float().cpu())
            index += batch["index"].tolist()
            label += batch["label"].tolist()
            captions += batch["captions"]
    parts = gather((features, index, label, captions, bad), runtime)
    features, index, label, captions, bad = ([item for part in parts for item in part[k]] for k in range(5))
    if runtime.is_main:
        report_bad(bad)
    if not features:
        raise UserError(f"none of the {len(data)} records can be read; {bad[0][0]}: {bad[0][1]}")
    order = torch.tensor(index).argsort()
    return dict(features=torch.cat(features)[order].to(runtime.device), index=torch.tensor(index)[order],
                label=torch.tensor(label)[order], captions=[captions[i] for i in order], bad=bad)


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------

class PairTransform:
    """A record -> {"images": uint8 (3, H, W), "captions": str}, with a caption drawn at random from several; with
    `labels` its class besides, and for SLIP and DeCLIP their views and second caption."""

    def __init__(self, options: "TrainOptions", labels: bool = False):
        self.image = data_module.TrainTransform(options.image_size, scale=(options.crop_min, 1.0), flip=options.flip)
        self.view = data_module.ViewTransform(options.image_size, scale=(options.view_crop_min, 1.0))
        self.method, self.labels = options.method, labels
        self.synonyms = data_module.read_synonyms(options.synonyms)

    def __call__(self, sample, rng) -> dict:
        labels = dict(labels=sample.text_label) if self.labels else {}
        if self.method not in ("slip", "declip", "defilip"):
            return dict(images=self.image(sample.image, rng), captions=data_module.pick_caption(sample, rng), **labels)
        image, caption = data_module.decode(sample.image), data_module.pick_caption(sample, rng)
        view1, view2 = self.view(image, rng), self.view(image, rng)
        if self.method == "slip":
            return dict(images=self.image(image, rng), view1=view1, view2=view2, captions=caption, **labels)
        second = data_module.edit_caption(caption, rng, self.synonyms)
        return dict(images=view1, view2=view2, captions=caption, captions2=second)


class PairCollate:
    """Joins records and tokenizes their captions, up to the longest one."""

    def __init__(self, tokenizer: BytePairTokenizer, context_length: int, multiple: int):
        self.tokenizer, self.context_length, self.multiple = tokenizer, context_length, multiple

    def __call__(self, items: list[dict]) -> dict:
        batch = data_module.collate(items)
        if "captions" not in batch:                         # not one record, nor a stand-in, could be read
            return batch
        if "captions2" in batch:
            batch["tokens2"] = self.tokens(batch.pop("captions2"))
        return dict(batch, tokens=self.tokens(batch.pop("captions")))

    def tokens(self, captions: list[str]) -> Tensor:
        """(B, L)"""
        tokens = self.tokenizer(captions, self.context_length)
        return data_module.trim(tokens, self.tokenizer.eot, self.multiple)


def hide(batch: dict, model: MaskCLIP, sot: int, step: int, options: TrainOptions, rank: int, world: int) -> dict:
    """Adds what the masked branches of this step need; see MaskCLIP.forward.  Draws are those of the global batch."""
    c, B, method = model.config, len(batch["images"]), METHODS[model.config.method]
    generator = torch.Generator().manual_seed((options.seed << 32) + step)
    rows = slice(rank * B, rank * B + B)
    if method["target"]:
        keep, hidden = random_mask(world * B, c.grid ** 2, c.mask_ratio, generator)
        batch = dict(batch, keep=keep[rows], hidden=hidden[rows])
    if method["mlm"]:
        noise = torch.rand(world * B, c.context_length, 3, generator=generator)[rows]
        corrupted, chosen = mask_words(batch["tokens"], c.word_ratio, sot, model.eot, model.text.mask_id, noise)
        batch = dict(batch, corrupted=corrupted, is_chosen=chosen)
    if "labels" in batch:       # UniCL: a pair that names no class is one of its own
        own = -1 - torch.arange(rank * B, rank * B + B)
        batch = dict(batch, labels=torch.where(batch["labels"] < 0, own, batch["labels"]))
    return batch


def micro_batches(batch: dict, count: int, device: torch.device) -> list[dict]:
    """The batch cut into `count` equal parts on the device, pixels normalized."""
    tensors = {name: value.chunk(count) for name, value in batch.items() if torch.is_tensor(value)}
    parts = [{name: values[i] for name, values in tensors.items()} for i in range(count)]
    for part in parts:
        if "is_chosen" in part:
            part["chosen"] = part.pop("is_chosen").flatten().nonzero().squeeze(1)     # here it costs no GPU sync
    parts = [{name: value.to(device, non_blocking=True) for name, value in part.items()} for part in parts]
    if "chosen" in parts[0]:
        # L_MLM is the mean over all masked words: each part's sum is divided by the mean count of parts and processes
        words = sum(len(part["chosen"]) for part in parts) / len(parts)
        words = mean_over_processes(torch.tensor(words, device=device))
        for part in parts:
            part["word_count"] = words
    return [{name: data_module.normalize(value) if value.dtype == torch.uint8 else value
             for name, value in part.items()} for part in parts]


def seeded(seed: int, function, *arguments):
    """function(*arguments) with layers' random numbers (stochastic depth) that depend on the seed alone."""
    torch.manual_seed(seed)
    return function(*arguments)


def backward(model: nn.Module, core: MaskCLIP, teacher: Teacher | None, parts: list[dict], weights: dict, temp: float,
             runtime: Runtime, seed: int = 0) -> tuple[dict, list]:
    """Forward and backward of one step over its micro-batches; returns the loss terms and the teacher's targets.

    The contrastive terms need the features of all micro-batches.  With more than one, these are first computed without
    gradient and the gradient of the contrast with respect to them is taken; then each part is computed again, and its
    features receive their share.  So negatives are those of the whole batch and the gradient is exact, at the memory of
    one part and the time of one more forward.  With one part nothing is computed twice.
    """
    count, terms, targets = len(parts), {}, []
    labels = dict(labels=torch.cat([part["labels"] for part in parts])) if "labels" in parts[0] else {}
    if count > 1:
        with torch.no_grad(), runtime.autocast():
            cached = [seeded(seed + i, core.encode, part) for i, part in enumerate(parts)]
        leaves = {name: torch.cat([c[name] for c in cached]).requires_grad_() for name in cached[0]}
        contrast = total_loss(core.contrast({**leaves, **labels}), weights)
        grads = dict(zip(leaves, torch.autograd.grad(contrast, list(leaves.values()))))
    for i, part in enumerate(parts):
        last = i == count - 1
        sync = contextlib.nullcontext() if last or model is core else model.no_sync()
        with sync:
            with runtime.autocast():
                target = teacher(part["images"], part["keep"], part["hidden"], temp) if teacher else None
                features, local = seeded(seed + i, model, part, target)
            loss = total_loss(local, weights) / count if local else 0.0
            if last:        # the others stand as constants; parameters of the contrast itself get their gradient here
                if count > 1:
                    features = {name: torch.cat([leaves[name].detach()[:-len(own)], own])
                                for name, own in features.items()}
                terms.update(core.contrast({**features, **labels}))
                loss = loss + total_loss({name: terms[name] for name in terms if name not in local}, weights)
            else:
                rows = slice(i * len(part["tokens"]), (i + 1) * len(part["tokens"]))
                loss = loss + sum((features[name] * grads[name][rows]).sum() for name in features)
            loss.backward()
        for name, value in local.items():
            terms[name] = terms.get(name, 0.0) + value.detach() / count
        targets.append(target)
    return {name: value.detach() for name, value in terms.items()}, targets


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def open_mixed(specs: tuple[str, ...], split: str, task: str, size: int, cache: Path | None = None):
    parts = [data_module.open_data(spec, split, task, size=size, cache=cache) for spec in specs]
    parts = data_module.name_classes(parts) if task == "captions" else parts
    return parts[0] if len(parts) == 1 else data_module.Mixed(parts)


def make_tokenizer(options: TrainOptions, data) -> BytePairTokenizer:
    """CLIP's merges from --bpe, those of the weights the run starts from, or as many as vocab_size allows learned from
    the captions of the first records."""
    kind, _, path = options.init.partition(":")
    if options.bpe or kind == "open_clip":
        tokenizer = BytePairTokenizer.from_file(options.bpe) if options.bpe else read_merges(path)
        options.vocab_size = max(options.vocab_size, tokenizer.vocab_size)
        return tokenizer
    return data_module.learn_tokenizer(data, options.vocab_size)


def write_text_atomically(path: Path, text: str):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def zeroshot_accuracy(model: MaskCLIP, tokenizer: BytePairTokenizer, runtime: Runtime, count: int = 1024) -> dict:
    """Accuracy over the 64 classes of the Shapes world on unseen scenes of one object; color and shape apart too."""
    world = data_module.ShapesWorld(split="val", count=count, size=model.config.image_size, objects=(1, 1))
    prompts = tokenizer([f"a {name}" for name in world.classes], model.config.context_length)       # (64, L)
    with torch.no_grad():
        classes = model.encode_text(prompts.to(runtime.device))                                     # (64, E)
    alone = dataclasses.replace(runtime, rank=0, world=1)       # the main process does this while no other is waiting
    found = extract(world, data_module.EvalTransform(model.config.image_size), model.encode_image, alone, 256)
    guess, label = similarity(found["features"], classes).argmax(dim=1).cpu(), found["label"]       # (n,) each
    n = len(data_module.SHAPES)
    right = dict(zeroshot=guess == label, color=guess // n == label // n, shape=guess % n == label % n)
    return {name: hit.double().mean().item() for name, hit in right.items()}


def train(options: TrainOptions):
    stop = StopSignal()
    runtime = setup(options)
    share = runtime.share(options.batch_size)
    if share % options.accumulate:
        raise UserError(f"--accumulate {options.accumulate} does not divide the {share} pairs of a process")
    out = Path(options.out)
    runtime.claim(out)

    data = open_mixed(options.data, "train", "captions", options.image_size, out / "index")
    if len(data) < options.batch_size:
        raise UserError(f"{len(data)} records are fewer than one batch of {options.batch_size}: choose a smaller "
                        f"--batch-size")
    tokenizer = make_tokenizer(options, data)
    identity = data_module.hash_names(data)
    steps_per_epoch = len(data) // options.batch_size
    total = options.steps or int(options.epochs * steps_per_epoch)
    if not total:
        raise UserError(f"--epochs {options.epochs:g} of {steps_per_epoch} steps are not one: give more, or --steps")
    warmup = min(int(options.warmup_epochs * steps_per_epoch), total // 5)

    labels = getattr(data, "names_classes", False)
    if labels and options.method in ("filip", "declip", "defilip"):
        raise UserError(f"--method {options.method} contrasts pairs and cannot use the labels of folder: data; choose "
                        f"another method, or data with captions")
    core = build(options, tokenizer.eot)
    state = find_resumable(options, out)
    if state:
        check_same_data(state, identity, out)
        if state.get("tokenizer") != tokenizer.state():
            raise UserError(f"{out} holds a run with another vocabulary: give the same --bpe, or choose another --out")
        load_resumed(core.load_state_dict, state["model"], out)
    elif ":" in options.init:
        initialize(core, options.init)
    core.to(runtime.device)
    method = METHODS[options.method]
    teacher = Teacher(core).to(runtime.device) if method["target"] == "teacher" else None
    optimizer = torch.optim.AdamW(param_groups(core, options.weight_decay), lr=options.lr, betas=(0.9, options.beta2),
                                  eps=options.eps, fused=True)
    first, bad_count = 0, 0
    if state:
        load_resumed(optimizer.load_state_dict, state["optimizer"], out)
        if teacher:
            load_resumed(teacher.load_state_dict, state["teacher"], out)
        first, bad_count = state["step"], state["bad_count"]
    runtime.check_alike(step_to_go_on_from=first, hash_of_the_data=identity, vocabulary=tokenizer.vocab_size)

    model = torch.compile(core) if options.compile else core
    if runtime.world > 1:
        model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    loader = data_module.train_loader(
        data, PairTransform(options, labels), options.batch_size, options.seed, range(first, total), runtime.rank,
        runtime.world, runtime.workers, PairCollate(tokenizer, options.context_length, 8 if options.compile else 1))
    log = Log(out, runtime.is_main, total, options.batch_size, first)
    if runtime.is_main:
        with tell_if_full(out / "config.json"):
            described = dict(asdict(options), records=len(data), data_hash=identity)
            write_text_atomically(out / "config.json", json.dumps(described, indent=1))
        announce(options, data, core, tokenizer, total, first, runtime)
    weights = {f.name.removesuffix("_weight"): getattr(options, f.name) for f in fields(Config)
               if f.name.endswith("_weight")}
    weights.update(pixel=options.distillation_weight, feature=options.distillation_weight)

    def save(step: int) -> bool:
        return not runtime.is_main or save_checkpoint(
            out / "last.pt", core, tokenizer, options, step=step, total=total, data=identity, bad_count=bad_count,
            optimizer=optimizer.state_dict(), teacher=teacher.state_dict() if teacher else None)

    saved, skipped = time.monotonic(), 0
    core.train()
    for step, batch in enumerate(loader, start=first):
        lr = cosine_schedule(step, total, warmup, options.lr, options.lr_end, options.lr_start)
        momentum = momentum_at(step, total, options.momentum, options.momentum_end) if method["ema"] else 0.0
        temp = teacher_temperature(step, total, options)
        for group in optimizer.param_groups:
            group["lr"] = lr
        bad = report_bad(batch.pop("bad"))
        check_full(batch, share, step)
        batch = hide(batch, core, tokenizer.sot, step, options, runtime.rank, runtime.world)
        parts = micro_batches(batch, options.accumulate, runtime.device)
        optimizer.zero_grad()
        terms, targets = backward(model, core, teacher, parts, weights, temp, runtime,
                                  seed=step * options.accumulate)
        norm = nn.utils.clip_grad_norm_(core.parameters(), options.clip_grad or math.inf)

        # one meeting a step: the terms' means, whether some process was asked to stop, the bad records of all
        told = mean_over_processes(torch.stack([*terms.values(), *norm.new_tensor([float(stop.is_set), float(bad)])]))
        *values, stopping, bad = told.tolist()
        terms = dict(zip(terms, values))
        if math.isfinite(sum(values)) and math.isfinite(norm.item()):
            skipped = 0
            if time.monotonic() - saved > options.checkpoint_every and step > first:
                save(step)              # the weights that this step began with: now their loss is known to be finite
                saved = time.monotonic()
            optimizer.step()
            with torch.no_grad():
                for name, parameter in core.named_parameters():
                    if name.endswith("logit_scale"):
                        parameter.clamp_(0, math.log(100))
            if teacher:
                teacher.update(core, momentum)
                if core.target == "codes":
                    for target in targets:
                        teacher.update_center(target, options.center_momentum ** (1 / len(targets)))
            if isinstance(core, DeCLIP):
                core.remember()
        else:
            skipped += 1
            refuse_update(terms, norm.item(), step, skipped, out)
        bad_count += round(bad * runtime.world)
        check_bad(bad_count, (step + 1) * options.batch_size, options.max_bad)

        if (step + 1) % options.log_every == 0 or step + 1 == total:
            loss = total_loss(terms, weights)
            collapse = teacher.collapse_monitor(targets[0]) if teacher and core.target == "codes" else {}
            log.line(step, dict(epoch=(step + 1) / steps_per_epoch, loss=loss, lr=lr, **terms,
                                momentum=momentum, logit_scale=core.logit_scale.exp().item(), grad_norm=norm.item(),
                                **collapse))
        else:
            log.pulse(step)
        if stopping:
            if not skipped and save(step + 1) and runtime.is_main:
                say(f"stopped after step {step + 1}; the same command goes on from there")
            sys.exit(128 + (stop.number or signal.SIGTERM))

    if first < total and not save(total):
        raise UserError(f"the finished model could not be saved to {out}/last.pt: free some space and run the "
                        f"command again")
    finish(options, core, tokenizer, runtime, bad_count)


def teacher_temperature(step: int, total: int, o: Config) -> float:
    """Linear from temp_t_start to temp_t over the first temp_t_warmup of the run."""
    progress = min(1.0, step / (o.temp_t_warmup * total)) if o.temp_t_warmup else 1.0
    return o.temp_t_start + (o.temp_t - o.temp_t_start) * progress


def report_bad(bad: list[tuple[str, str]]) -> int:
    for name, reason in bad:
        say(f"skipped {data_module.printable(f'{name}: {reason}')}", file=sys.stderr)
    return len(bad)


def check_full(batch: dict, share: int, step: int):
    if len(batch.get("images", ())) < share:
        raise UserError(f"step {step + 1}: too many bad records in a row to fill the batch; look at them with: "
                        f"python data.py check --data SPEC")


def check_bad(bad: int, read: int, limit: float):
    if bad > limit * max(read, 100):
        raise UserError(f"{bad} of {read} records read so far are bad, more than --max-bad {limit}: "
                        f"look at them with: python data.py check --data SPEC")


def refuse_update(terms: dict, norm: float, step: int, skipped: int, out: Path):
    """Names what is not finite; the tenth such step in a row ends the run."""
    names = [name for name, value in terms.items() if not math.isfinite(value)] or [f"gradient (norm {norm})"]
    say(f"warning: step {step + 1}: {', '.join(names)} is not finite; update skipped", file=sys.stderr)
    if skipped == 10:
        left = f"the last good checkpoint is {out}/last.pt" if (out / "last.pt").exists() else "no checkpoint yet"
        raise UserError(f"{', '.join(names)} was not finite for 10 steps in a row, up to step {step + 1}; {left}: "
                        f"try --precision fp32, a lower --lr or --clip-grad 1")


def announce(o: TrainOptions, data, model: MaskCLIP, tokenizer, total: int, first: int, runtime: Runtime):
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{o.method} with preset {o.preset}: {parameters / 1e6:.1f} M parameters, {len(data)} records, "
        f"{total} steps of {o.batch_size}, {tokenizer.vocab_size} tokens; "
        f"{runtime.world} x {runtime.device.type}, {'bf16' if runtime.bf16 else 'fp32'}")
    for note in getattr(data, "notes", ()):
        say(f"note: {data_module.printable(note)}")
    if len(data) % o.batch_size:
        say(f"note: {len(data) % o.batch_size} records fill no batch and are left out of an epoch, others in each")
    if not o.bpe and tokenizer.vocab_size < 49408 <= o.vocab_size:
        say("note: the vocabulary was learned from the captions: for CLIP's, give its merges file with --bpe")
    if first:
        say(f"going on from step {first} of {o.out}/last.pt")


def finish(o: TrainOptions, core: MaskCLIP, tokenizer: BytePairTokenizer, runtime: Runtime, bad_count: int):
    if not runtime.is_main:
        return
    say(f"done: {o.out}/last.pt" + (f", {bad_count} bad records skipped" if bad_count else ""))
    show_curves(Path(o.out))
    if all(spec.startswith("shapes") for spec in o.data):
        core.eval()
        count = 1024 if o.image_size < 100 else 128         # a large tower needs a second an image on a CPU
        accuracy = zeroshot_accuracy(core, tokenizer, runtime, count)
        say(f"zero-shot accuracy on unseen scenes, 64 classes: {accuracy['zeroshot']:.1%}  "
            f"(color {accuracy['color']:.1%}, shape {accuracy['shape']:.1%}; chance 1.6%)")
    def named(kinds) -> str:
        spec = next((spec for spec in o.data if spec.partition(":")[0] in kinds), "shapes")
        return "" if spec.startswith("shapes") else f" --data {shlex.quote(spec)}"
    pairs = ("shapes", "shards", "csv", "coco", "flickr30k")
    say(f"next:  python eval_zeroshot.py {o.out}/last.pt{named(('folder', *pairs))}   |   "
        f"python dense.py words {o.out}/last.pt{named(pairs)}")


# ---------------------------------------------------------------------------------------------------------------------
# python train.py --plan: what a run would cost
# ---------------------------------------------------------------------------------------------------------------------

# dense bf16 TFLOP/s, GB of memory, GB/s to devices of other nodes, its share of what is usual: 400 Gb/s for Hopper, 200
# for A100, 100 for L40S and 4090, 100 a node of eight for V100, which multiplies no bfloat16: its TFLOP/s are of fp32
GPUS = {
    "h200": (989, 141, 50.0), "h100": (989, 80, 50.0), "a100": (312, 80, 25.0), "a100-40gb": (312, 40, 25.0),
    "l40s": (362, 48, 12.5), "4090": (165, 24, 12.5), "v100": (15.7, 32, 1.6),
}


def plan(o: TrainOptions):
    """FLOPs, memory, communication and time of the run, each with the formula it comes from."""
    (tflops, memory, gbytes), bf16 = GPUS[o.gpu], o.gpu != "v100"
    if o.batch_size % (o.gpus * o.accumulate):
        raise UserError(f"--batch-size {o.batch_size} cannot be shared by --gpus {o.gpus} times --accumulate "
                        f"{o.accumulate}: choose a multiple of {o.gpus * o.accumulate}")
    own = o.batch_size // (o.gpus * o.accumulate)
    steps = o.steps or int(o.epochs * (o.pairs // o.batch_size))
    flops = o.batch_size * step_flops(o)
    need, traffic = step_memory(o, own, bf16=bf16), step_traffic(o, o.gpus)
    if o.accumulate > 1:                                # a forward of the two towers more
        flops += o.batch_size * sum(cost.flops for cost in costs(o)[:2])
    compute = flops / (o.gpus * tflops * 1e12 * o.utilization)
    exchange = {name: value / (gbytes * 1e9) for name, value in traffic.items()}
    seconds = max(compute, exchange["gradients"]) + exchange["features"]
    hours = steps * seconds / 3600
    gb = {name: value / 1e9 for name, value in need.items()}
    print(f"plan: {o.method}, preset {o.preset}, {o.gpus} x {o.gpu} in {'bf16' if bf16 else 'fp32'}, "
          f"as if every caption had {o.context_length} tokens")
    print(f"steps          {steps:,}" + ("" if o.steps else
          f" = {o.epochs:g} epochs x {o.pairs:,} pairs / batch of {o.batch_size:,}"))
    print(f"FLOPs          {flops / 1e15:.2f} P a step = {o.batch_size:,} pairs x {flops / o.batch_size / 1e9:.1f} G "
          f"(python model.py: forward x passes); {steps * flops / 1e18:.1f} E in all")
    print(f"memory         {sum(gb.values()):.1f} of {memory} GB a device = states {gb['states']:.1f} + activations of "
          f"{own} pairs {gb['activations']:.1f} + logits {gb['logits']:.1f}")
    print(f"communication  {sum(traffic.values()) / 1e9:.2f} GB a step and device = gradients "
          f"{traffic['gradients'] / 1e9:.2f} (during backward) + features {traffic['features'] / 1e9:.3f}")
    print(f"a step         {seconds:.3f} s = max(FLOPs / ({o.gpus} x {tflops:g} T x utilization {o.utilization:g}, "
          f"assumed) = {compute:.3f}, gradients / {gbytes:g} GB/s = {exchange['gradients']:.3f}) + features "
          f"{exchange['features']:.3f}")
    print(f"time           {hours:.1f} hours, {hours * o.gpus:.0f} GPU hours")
    if sum(gb.values()) > 0.9 * memory:
        print(f"note: this does not fit {o.gpu}: give --accumulate {o.accumulate * 2} or more --gpus")


def main():
    options = parse_train_options()
    plan(options) if options.plan else train(options)


if __name__ == "__main__":
    run(main)
