"""The device that is chosen, and the precision there."""

import pytest
import torch

from device import choose_device, choose_matmul_precision
from errors import InputError


@pytest.mark.parametrize("name", ["cuda:99", "potato", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_refused_by_its_flag(name):
    with pytest.raises(InputError, match=f"--device {name}") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "GPU", "cuda0", "cuda:-1", "cuda:", "vulkan", "meta", "cpu cuda", ""])
def test_a_name_that_is_no_device_is_told_the_choices_and_nothing_else(name):
    """PyTorch's own answer lists twenty backends."""
    with pytest.raises(InputError) as caught:
        choose_device(name)
    assert str(caught.value) == f"--device {name} is no device: choose auto, cpu, cuda, cuda:<n> or mps"


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


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_products_on_the_cpu_are_as_exact_as_float32_whatever_is_chosen(precision, before):
    torch.set_float32_matmul_precision(before)
    assert choose_matmul_precision(torch.device("cpu")) == torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(300, 700, generator=generator) for _ in range(2))
    exact = one.double() @ other.double().t()
    assert (one @ other.t() - exact).abs().max() < 1e-5 * exact.abs().max()
