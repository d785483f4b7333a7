"""What depends on launcher and machine: devices, allocator, seeds, signals, how a user's mistake ends."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from common import dist
from common.dist import UserError


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, **env})


def test_a_user_error_ends_the_process_with_one_line_and_code_2():
    result = python("from common.dist import UserError; raise UserError('--lr=x: expected float')")
    assert (result.returncode, result.stderr) == (2, "error: --lr=x: expected float\n")


def test_any_other_error_keeps_its_traceback():
    result = python("import common.dist; 1 / 0")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize("device", ["cuda", "tpu", "cuda:0"])
def test_a_device_that_is_not_there_is_refused_by_name(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=f"--device={device}"):
        dist.init(device)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")
def test_the_allocator_is_tuned_unless_the_environment_says_no():
    code = "from common import dist; print(dist.tune_malloc())"
    assert python(code, KEEP_MALLOC="").stdout == "True\n"
    assert python(code, KEEP_MALLOC="1").stdout == "False\n"


def test_threads_fill_the_cores_that_torchrun_left_idle():
    code = "import torch; from common import dist; dist.init('cpu'); print(torch.get_num_threads())"
    cores = len(os.sched_getaffinity(0))
    torchrun = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", OMP_NUM_THREADS="1")
    assert python(code, **torchrun, LOCAL_WORLD_SIZE="1").stdout == f"{cores}\n"
    assert python(code, **torchrun, LOCAL_WORLD_SIZE=str(cores)).stdout == "1\n"


def test_seeds_depend_on_every_number_and_repeat():
    def draw(*numbers):
        dist.seed(*numbers)
        return torch.rand(4).tolist()
    draws = [draw(1, 2), draw(2, 1), draw(1, 3), draw(1, 2, 0), draw(3)]
    assert len({tuple(d) for d in draws}) == len(draws) and draw(1, 2) == draws[0]


def test_one_process_needs_no_process_group():
    x = torch.tensor([1.0, 2.0])
    assert dist.all_sum(x) is x and dist.all_sum(3).item() == 3
    assert dist.world() == (0, 1) and dist.gather_objects("a") == ["a"]
    assert dist.from_rank_zero(lambda: 5) == 5
    dist.check_equal("config", {"lr": 1})


def test_a_dtype_that_this_cpu_multiplies_slowly_is_warned_about(monkeypatch, capsys):
    """PITFALL: bf16 products on a CPU without bf16 units are 10-400 times slower than fp32."""
    monkeypatch.setattr(dist, "gemm_flops", lambda dtype, *a, **k: 1e9 if dtype == torch.float32 else 2e7)
    context, dtype = dist.autocast(torch.device("cpu"), "bfloat16")
    assert dtype == torch.bfloat16
    assert "50x slower than float32; use --dtype=float32" in capsys.readouterr().err
    with context:
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16
    monkeypatch.setattr(dist, "gemm_flops", lambda dtype, *args, **kwargs: 1e9)
    dist.autocast(torch.device("cpu"), "bfloat16")
    assert capsys.readouterr().err == ""


def test_fp32_is_the_default_on_a_cpu():
    context, dtype = dist.autocast(torch.device("cpu"), "auto")
    with context:
        assert dtype == torch.float32 and torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.float32


def test_the_first_signal_raises_a_flag_and_the_second_kills():
    code = ("import os, signal; from common import dist; dist.watch_signals(); print(dist.stop_requested()); "
            "os.kill(os.getpid(), signal.SIGTERM); print(dist.stop_requested(), flush=True); "
            "os.kill(os.getpid(), signal.SIGTERM); print('alive')")
    result = python(code)
    assert result.stdout == "False\nTrue\n" and result.returncode == -15
    assert "SIGTERM: finishing this step, then saving" in result.stderr
