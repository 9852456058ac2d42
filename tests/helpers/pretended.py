"""Run scripts on a CUDA or MPS device that does not exist, in a separate process:

    python tests/helpers/pretended.py cuda '[["train.py", "--num_epochs", "1"], ["compute_results.py"]]'

A tensor on the device is CPU data in a wrapper that claims otherwise. Each operator on it is checked before the CPU
computes it. What the real device would refuse is counted by the project's function and line:

    crash   NumPy is asked to read a tensor of the device
    mixed   an operator is given tensors of both devices
    wide    float64 on the device, which MPS does not have
    wait    the CPU would wait for the device

The last line of the output is JSON: [exit code of each command, [[kind, what, file, function, line, times], ...]].
Not seen: the device's own kernels, autocast's choices there, streams, pinned memory. Backward passes are computed, but
autograd keeps some of its tensors without their wrapper, so mixed devices in it mean nothing.
"""

import json
import os
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch._dynamo
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(os.environ.get("PRETENDED_ROOT", Path(__file__).resolve().parents[2]))

NOT_THE_PROJECT_S = {"tests", ".venv"}

WAITING = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
}

LIBRARY = str(Path(torch.__file__).parent)

COPYING = {"copy_", "_to_copy", "_pack_padded_sequence", "_copy_from"}

found, parameters, kind = Counter(), [], "cuda"


def note(what, detail):
    """Count a finding at the innermost line of the project."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in NOT_THE_PROJECT_S:
            found[(what, detail, path.relative_to(ROOT).as_posix(), frame.name, frame.lineno)] += 1
            return


def is_ours(device):
    """Whether a device or its name is the pretended one."""
    return isinstance(device, (str, torch.device)) and torch.device(device).type == kind


def bare(tree):
    """The same with the CPU data in place of wrappers."""
    return tree_map(lambda x: x.inside if isinstance(x, There) else x, tree)


class There(torch.Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device(kind, 0))
    is_cuda = property(lambda self: kind == "cuda")
    is_mps = property(lambda self: kind == "mps")

    @staticmethod
    def __new__(cls, inside):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
        )
        tensor.inside = inside
        return tensor

    def __repr__(self, **_):
        return f"{self.inside!r} on {kind}"

    def __array__(self, *_, **__):
        note("crash", "__array__")
        return self.inside.numpy()

    def __reduce_ex__(self, protocol):  # torch.save writes what lies on the device
        return self.inside.__reduce_ex__(protocol)

    def untyped_storage(self):
        return self.inside.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name.split("::")[1]
        looked_at(name, args, kwargs)
        here_args, here_kwargs = bare((args, kwargs))
        result = operator(*here_args, **here_kwargs)
        if name == "_pack_padded_sequence":
            return There(result[0]), result[1]  # the batch sizes stay on the CPU
        known = {id(x.inside): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, There)}

        def there(x):
            if not isinstance(x, torch.Tensor) or isinstance(x, There):
                return x
            return known[id(x)] if id(x) in known else There(x)

        return tree_map(there, result)


def looked_at(name, args, kwargs):
    """Note what the device would refuse of an operator."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, There)]
    if name in WAITING:
        note("wait", name)
    if name.startswith(("index.", "index_put", "_index_put")) or name == "index":
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            note("wait", f"{name} by a mask")
        if not isinstance(args[0], There) and any(isinstance(x, There) for x in indices):
            note("mixed", f"{name} of a CPU tensor by indices on the device")
    elif name not in COPYING and ours and any(x.dim() for x in tensors if not isinstance(x, There)):
        note("mixed", name)
    if kwargs.get("dtype") is torch.float64:
        note("wide", name)


class Pretence(TorchFunctionMode):
    """Wraps tensors made on the device or moved to it, and unwraps those moved back."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, first = getattr(function, "__name__", ""), args[0] if args else None
        if name == "pin_memory":
            return first
        if name in ("to", "cuda", "cpu") and isinstance(first, torch.Tensor):
            device = {"cuda": kind, "cpu": "cpu"}.get(name)
            return self.taken(first, args[1:], kwargs, device)
        if isinstance(first, There):
            if name in ("numpy", "tolist"):
                note("crash" if name == "numpy" else "wait", name)
                return getattr(first.inside, name)(*args[1:])
            if name == "resize_":  # a wrapper's size is fixed
                shape = args[1] if len(args) == 2 else args[1:]
                return (
                    first
                    if tuple(first.shape) == tuple(shape)
                    else There(first.inside.new_empty(shape))
                )
            if name == "unflatten":
                dim = args[1] % first.dim()
                return first.reshape(*first.shape[:dim], *args[2], *first.shape[dim + 1 :])
        if is_ours(kwargs.get("device")):
            return self.made(function, args, {**kwargs, "device": None}, kwargs.get("dtype"))
        result = function(*args, **kwargs)
        if name == "backward":
            for parameter in parameters:
                if parameter.grad is not None and not isinstance(parameter.grad, There):
                    parameter.grad = There(parameter.grad)
        return result

    def made(self, function, args, kwargs, dtype):
        """A new tensor on the device."""
        if dtype is torch.float64:
            note("wide", function.__name__)
        kwargs.pop("device")
        if args and isinstance(args[0], There):  # as_tensor of what is there
            return (
                args[0]
                if dtype in (None, args[0].dtype)
                else torch.ops.aten._to_copy(args[0], dtype=dtype)
            )
        result = function(*args, **kwargs)
        return result if isinstance(result, There) else There(result.detach())

    def taken(self, tensor, rest, kwargs, device):
        """Tensor.to, .cuda and .cpu."""
        device, dtype = device or kwargs.get("device"), kwargs.get("dtype")
        for one in rest:
            if isinstance(one, torch.Tensor):
                device, dtype = one.device, one.dtype
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, (str, torch.device)):
                device = one
        on_device = isinstance(tensor, There)
        if dtype is torch.float64 and (is_ours(device) or device is None and on_device):
            note("wide", "to")
        if dtype not in (None, tensor.dtype):
            tensor = (
                torch.ops.aten._to_copy(tensor, dtype=dtype)
                if on_device
                else torch.Tensor.type(tensor, dtype)
            )
        if device is None or is_ours(device) == on_device:
            return tensor
        if on_device:
            # PyTorch's own code groups gradients by device, and is told of the CPU that lies
            # beneath the wrapper.
            if not sys._getframe(2).f_code.co_filename.startswith(LIBRARY):
                note("wait", "to cpu")
            return tensor.inside
        return There(tensor.detach())


def module_to(module, *args, **kwargs):
    """nn.Module.to: parameters and buffers live on the device from now on."""
    if not any(map(is_ours, (*args, kwargs.get("device")))):
        return true_module_to(module, *args, **kwargs)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter.data, There):
                part._parameters[name] = torch.nn.Parameter(
                    There(parameter.detach().clone()), parameter.requires_grad
                )
                parameters.append(part._parameters[name])
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, There):
                part._buffers[name] = There(buffer.detach().clone())
    return module


def pad_packed(data, *rest):
    """torch._VF._pad_packed_sequence, which writes into a tensor of the CPU that lies beneath the wrapper."""
    result, lengths = true_pad_packed(data, *rest)
    if isinstance(data, There) and not isinstance(result, There):
        found_before = found.copy()
        result = result + There(torch.zeros(()))  # a wrapper that gradients go through
        found.clear()
        found.update(found_before)
    return result, lengths


true_module_to, true_pad_packed = torch.nn.Module.to, torch._VF._pad_packed_sequence


def replace_torch_s_own():
    """What PyTorch says of its devices, and what it does to one of them."""
    torch.nn.Module.to, torch._VF._pad_packed_sequence = module_to, pad_packed
    torch.cuda.is_available, torch.backends.mps.is_available = (
        lambda: kind == "cuda",
        lambda: kind == "mps",
    )
    torch.cuda.device_count, torch.cuda.mem_get_info = (
        lambda: 1,
        lambda device=None: (10**11, 10**11),
    )
    torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all = list, lambda states: None
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = (
        lambda device=None: None,
        lambda state, device=None: None,
    )
    torch.mps.get_rng_state, torch.mps.set_rng_state = lambda: None, lambda state: None
    torch.backends.mps.is_macos_or_newer = lambda major, minor: (
        True
    )  # which autocast of PyTorch 2.6 asks
    torch.cuda.is_initialized = lambda: kind == "cuda"
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_device_name = lambda device=None: "pretended"
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.backends.cudnn.is_acceptable = lambda tensor: False
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, check, lambda self: None)


def run(script, *flags):
    """One command; returns its exit code."""
    sys.argv = [script, *flags, "--device", kind]
    try:
        with Pretence():
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    kind = sys.argv[1]
    commands = json.loads(sys.argv[2])
    sys.path.insert(0, str(ROOT))
    replace_torch_s_own()
    codes = []
    for command in commands:
        parameters.clear()
        codes.append(run(*command))
    print(json.dumps([codes, [[*key, times] for key, times in found.items()]]))
