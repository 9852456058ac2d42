"""The device that is chosen, and the precision of its products."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import device
from runtime.device import Products, amp_in_words, choose_device, choose_matmul_precision
from runtime.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "potato", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_refused_by_its_flag(name):
    with pytest.raises(InputError, match=f"--device {name}") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["gpu", "GPU", "cuda0", "cuda:-1", "cuda:", "vulkan", "meta", "cpu cuda", ""]
)
def test_a_name_that_is_no_device_is_told_the_choices_and_nothing_else(name):
    """PyTorch's own answer lists twenty backends."""
    with pytest.raises(InputError) as caught:
        choose_device(name)
    assert (
        str(caught.value)
        == f"--device {name} is not a device: choose auto, cpu, cuda, cuda:<n> or mps"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(InputError, match="--device cuda"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_cpu_and_auto_are_always_there(name):
    assert isinstance(choose_device(name), torch.device)


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


true_timed = importlib.util.module_from_spec(importlib.util.find_spec("runtime.device"))

true_timed.__spec__.loader.exec_module(
    true_timed
)  # conftest.py has put figures in place of the module's clock


def times(monkeypatch, **seconds):
    monkeypatch.setattr(
        device, "_timed", lambda kinds, rows, width: {kind: seconds[kind] for kind in kinds}
    )


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_products_on_the_cpu_are_as_exact_as_float32_whatever_is_chosen(precision, before):
    torch.set_float32_matmul_precision(before)
    assert choose_matmul_precision(CPU).kind == torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(300, 700, generator=generator) for _ in range(2))
    exact = one.double() @ other.double().t()
    assert (one @ other.t() - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    "exact, seconds, kept, expected",
    [
        (("highest", "medium"), (3.0, 1.0), None, "medium"),
        (("highest", "medium"), (1.0, 3.0), None, "highest"),
        (("highest", "medium"), (1.05, 1.0), None, "highest"),  # a close call
        (("highest",), (3.0, 1.0), None, "highest"),
        (("highest",), (3.0, 1.0), "medium", "highest"),
        (("highest", "medium"), (3.0, 1.0), "highest", "highest"),
        (("highest", "medium"), (1.0, 3.0), "medium", "medium"),
        (("highest", "medium"), (3.0, 1.0), "potato", "medium"),
    ],
    ids=str,
)
def test_the_kind_is_the_run_s_own_or_the_clearly_faster_exact_one(
    precision, monkeypatch, exact, seconds, kept, expected
):
    times(monkeypatch, highest=seconds[0], medium=seconds[1])
    monkeypatch.setattr(device, "_is_exact", lambda kind: kind in exact)
    assert (
        choose_matmul_precision(CPU, kept).kind == torch.get_float32_matmul_precision() == expected
    )


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_other_devices_keep_pytorch_s_products(precision, kind):
    torch.set_float32_matmul_precision("high")
    assert choose_matmul_precision(torch.device(kind), "medium", "bf16") == ("high", {})


def test_a_product_that_is_not_exact_is_told(precision, monkeypatch):
    """bf16 in place of the products that are checked."""
    true = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: (
            true(a, b) if a.dtype == torch.float64 else true(a.bfloat16(), b.bfloat16()).float()
        ),
    )
    assert not device._is_exact("highest")


@pytest.mark.parametrize(
    "bf16, words",
    [
        (0.5, "bf16 (products 2.00 times faster)"),
        (2.0, "bf16, WARNING: its products are 0.50 times as fast as float32"),
    ],
)
def test_amp_says_whether_bf16_is_worth_it(precision, monkeypatch, bf16, words):
    times(monkeypatch, highest=1.0, medium=1.0, bf16=bf16)
    products = choose_matmul_precision(CPU, "highest", "bf16")
    assert amp_in_words("bf16", CPU, products).startswith(words)
    assert str(products).startswith("highest (a product: highest 1000.00 ms, ")


def test_amp_says_what_cuda_makes_of_it():
    nothing = Products("highest", {})
    assert amp_in_words("off", torch.device("cuda"), nothing) == "off"
    assert "the GRU in float16" in amp_in_words("bf16", torch.device("cuda"), nothing)
    assert amp_in_words("bf16", torch.device("mps"), nothing) == "bf16"


def test_the_clock_stops_after_some_rounds_or_some_time(precision, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(true_timed, "_clock", lambda: float(next(ticks)))
    monkeypatch.setattr(true_timed, "PROBE_SECONDS", 10**5)
    assert true_timed._timed(["highest", "bf16"], 8, 16) == {"highest": 1, "bf16": 1}
    started = next(ticks)
    assert started >= true_timed.PROBE_ROUNDS * 2 * 2  # two looks at the clock for each kind
    monkeypatch.setattr(true_timed, "PROBE_SECONDS", 0)
    assert true_timed._timed(["highest"], 8, 16) == {"highest": 1} and next(ticks) - started <= 12


def test_the_best_round_of_a_kind_counts_and_the_threads_are_as_before(precision, monkeypatch):
    """Rounds as a busy machine gives them: another process's turn falls on one kind's product."""
    times, now, calls = iter([9, 9, 5, 1, 1, 50, 80, 1.5]), [0.0], []
    true_threads, before = torch.set_num_threads, torch.get_num_threads()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: now.append(now[-1] + next(times)))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (calls.append(n), true_threads(n)))
    monkeypatch.setattr(true_timed, "_clock", lambda: now[-1])
    monkeypatch.setattr(true_timed, "PROBE_ROUNDS", 4)
    monkeypatch.setattr(true_timed, "PROBE_SECONDS", 10**5)
    assert true_timed._timed(["highest", "medium"], 8, 16) == {"highest": 1, "medium": 1}
    assert calls == [1, before]


def test_equal_products_are_a_close_call_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda kind: None)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for _ in range(3):
            one, other = true_timed._timed(["one", "other"], 64, 256).values()
            assert max(one, other) < device.CLEARLY * min(one, other)
    finally:
        for process in busy:
            process.kill()
            process.wait()


COUNT_FAULTS = """
import resource
import torch
import runtime.device
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
before = faults()
torch.ones(2**24)  # 64 MB
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's huge pages")
def test_large_tensors_lie_in_huge_pages():
    """64 MB are 16,384 pages of 4 KB, and as many interruptions, or 32 huge ones."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the system gives no huge pages")
    plain = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    own = {name: value for name, value in plain.items() if name != "THP_MEM_ALLOC_ENABLE"}
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", COUNT_FAULTS], env=environment))
        for environment in (own, plain)
    )
    assert few < 3000
    assert many > 12_000 or "[always]" in setting.read_text()  # a user's own setting stays
