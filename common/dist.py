"""
Processes, devices, threads, memory, signals: everything that depends on the launcher or on the
machine.

The same script runs as `python train_x.py` (one process) and `torchrun --nproc_per_node=8
train_x.py` (one process per device, NCCL on GPUs, Gloo on CPUs). This file is the only reader of
os.environ:

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE   set by torchrun
    OMP_NUM_THREADS                                  torchrun sets it to 1; see `init`
    KEEP_MALLOC=1                                    leave the C allocator as it is; see
                                                     `tune_malloc`
"""

import ctypes
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as td

from common.errors import UserError, show_user_errors

# -----------------------------------------------------------------------------
# start and end


def init(device="auto"):
    """
    Join the process group if torchrun started us. device: auto, cpu, cuda, mps
    -> (rank, world_size, torch.device).

    Raises UserError when the device is not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "--device=cuda: torch sees no CUDA device here; "
                "use --device=cpu or install a CUDA torch"
            )
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node: rank {rank} has no GPU of its own, "
                f"this host has {torch.cuda.device_count()}"
            )
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    elif device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: torch sees no Apple GPU here; use --device=cpu")
    elif device not in ("cpu", "mps"):
        raise UserError(f"--device={device}: expected auto, cpu, cuda or mps")
    if device == "cpu":
        tune_malloc()
        if os.environ.get("OMP_NUM_THREADS") == "1" and "LOCAL_WORLD_SIZE" in os.environ:
            # torchrun's default of one thread a rank leaves cores idle when ranks < cores
            torch.set_num_threads(
                max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
            )
    if world_size > 1 and not td.is_initialized():
        td.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        # torch has put a hook of its own that swallows our exit code
        show_user_errors()
    return rank, world_size, torch.device(device)


def tune_malloc():
    """
    Keep freed memory in the process: glibc otherwise hands every big buffer back to the kernel and
    takes it again a moment later, and a training step spends a third of its time in page faults.
    KEEP_MALLOC=1 turns this off (for an allocator of your own choice). Constants: malloc.h,
    M_TRIM_THRESHOLD = -1, M_MMAP_THRESHOLD = -3. -> True if set
    """
    if os.environ.get("KEEP_MALLOC") or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl has none
        return False
    biggest = 2**31 - 1
    return bool(libc.mallopt(-3, biggest)) and bool(libc.mallopt(-1, biggest))


def finish():
    """
    Leave the process group: all ranks together, as Gloo aborts when a peer disappears mid-teardown.
    """
    if td.is_initialized():
        td.barrier()
        td.destroy_process_group()


def leave(text):
    """Print text once, and end the program in good order"""
    if world()[0] == 0:
        print(text, flush=True)
    finish()
    sys.exit(0)


# -----------------------------------------------------------------------------
# talking to the other ranks; with one process all of these cost nothing


def world():
    """-> (rank, world_size)"""
    return (td.get_rank(), td.get_world_size()) if td.is_initialized() else (0, 1)


def all_sum(x):
    """
    Sum over ranks, in place for a tensor. x: tensor or number -> tensor, the same on all ranks.
    """
    if not torch.is_tensor(x):
        x = torch.tensor(float(x), dtype=torch.float64)
    if td.is_initialized():
        home = x.device
        if td.get_backend() == "nccl" and home.type == "cpu":
            x = x.cuda()
        td.all_reduce(x)
        x = x.to(home)
    return x


def gather_objects(value):
    """The value of every rank, in rank order (small picklable things only)."""
    if not td.is_initialized():
        return [value]
    values = [None] * td.get_world_size()
    td.all_gather_object(values, value)
    return values


def from_rank_zero(function):
    """
    Call function() on rank 0 and give every rank its result, or raise what it raised on every rank.
    For work that touches the disk once for all: no rank goes on before it is done.
    """
    outcome = [None, None]
    if world()[0] == 0:
        try:
            outcome[0] = function()
        # the others are waiting: they must hear of it
        except Exception as error:
            outcome[1] = error
    if td.is_initialized():
        td.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_equal(what, values):
    """
    All ranks must hold equal values (dict name -> value), or a UserError names the first that
    differs.
    """
    everyone = gather_objects(values)
    for rank, theirs in enumerate(everyone):
        for name in sorted(set(everyone[0]) | set(theirs)):
            if theirs.get(name) != everyone[0].get(name):
                ours = everyone[0].get(name)
                raise UserError(
                    f"{what} differs between ranks: {name} is {ours!r} on rank 0 and "
                    f"{theirs.get(name)!r} on rank {rank}; start all ranks with the same arguments"
                )


def seed(*numbers):
    """
    Seed torch on this rank from (run seed, step, ...): every step starts from a known state, so
    that neither evaluation nor a resume can shift it, and ranks draw different dropout masks.
    """
    mixed = 0
    for number in (*numbers, world()[0]):
        mixed = (mixed * 6364136223846793005 + int(number) + 1442695040888963407) % 2**63
    torch.manual_seed(mixed)


# -----------------------------------------------------------------------------
# stopping: SIGTERM or Ctrl-C finishes the step, saves and exits 0

_stop_signal = []


def watch_signals():
    """
    From here on the first SIGTERM or SIGINT sets a flag (`stop_requested`); a second kills as
    usual.
    """

    def remember(number, frame):
        _stop_signal.append(number)
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        text = f"{name}: finishing this step, then saving (again: stop at once)"
        print(text, file=sys.stderr, flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)


def stop_requested():
    """True on every rank once any rank got a signal. All ranks must call it together."""
    return bool(all_sum(len(_stop_signal)).item())


def short_time(seconds):
    """75 -> 1m15s"""
    hours, rest = divmod(int(seconds), 3600)
    if hours:
        return f"{hours}h{rest // 60:02d}m"
    return f"{rest // 60}m{rest % 60:02d}s" if rest >= 60 else f"{rest}s"


# -----------------------------------------------------------------------------
# numbers about the device

# dense bf16 peak, FLOP/s, from the vendors' data sheets
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device):
    """
    FLOP/s that this rank could reach at best, the denominator of MFU: the data sheet's dense bf16
    number for a known GPU, a timed fp32 matrix product on a CPU, nan elsewhere.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((flops for key, flops in _PEAK_FLOPS.items() if key in name), math.nan)
    return gemm_flops(torch.float32) if device.type == "cpu" else math.nan


def gemm_flops(dtype, n=1024, repeats=5):
    """Best of a few timed n x n matrix products on the CPU, FLOP/s."""
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def compute_dtype(x):
    """The dtype of matrix products with x: autocast's where it is on, else x's own"""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def autocast(device, dtype):
    """
    dtype: auto, float32, bfloat16, float16 -> (context manager to compute in, its torch.dtype).
    auto is bfloat16 on a GPU that has it, float32 elsewhere. Weights are not touched. Warns when a
    CPU computes bfloat16 slower than float32.
    """
    if dtype == "auto":
        dtype = (
            "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        )
    dtype = getattr(torch, dtype)
    if device.type == "cpu" and dtype != torch.float32 and world()[0] == 0:
        slower = gemm_flops(torch.float32, 256) / gemm_flops(dtype, 256, repeats=2)
        if slower > 1:
            print(
                f"warning: this CPU multiplies {dtype} {slower:.0f}x slower than float32; "
                "use --dtype=float32",
                file=sys.stderr,
            )
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32), dtype
