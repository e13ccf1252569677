"""Choice of float32 or bf16: the requested precision, else the faster one on the device."""

from __future__ import annotations

import platform
import time

import torch

from drpo.config import ConfigError

PRECISIONS = {"no": "float32", "bf16": "bf16"}  # accelerate's word, ours


def choose_precision(requested: str | None, launcher: str | None, device: str) -> tuple[str, str]:
    """Return the precision in accelerate's terms and the reason: the recipe's, else the launcher's or the device's.

    `accelerate launch` passes "no" also by default, so an explicit "no" cannot be recognised.
    """
    if requested is not None:
        return requested, "as the recipe says"
    fast = multiplies_bf16(device)
    if launcher == "no" and fast:
        return launcher, "as accelerate launch says; its --mixed_precision=bf16 is faster here"
    if launcher is not None:
        check_precision(launcher)
        return launcher, "as accelerate launch says"
    if fast:
        return "bf16", f"which this {shown(device)} multiplies fastest"
    return "no", f"since this {shown(device)} has no fast bf16 products"


def settled_why(requested: str | None, chosen: str | None, actual: str, reason: str) -> str:
    """Return why accelerate computes in the `actual` precision, after one was `chosen`.

    DeepSpeed follows its own config file. Raises ConfigError where it differs from the recipe's `requested` one.
    """
    check_precision(actual)
    if chosen in (None, actual):
        return reason
    if requested is not None:
        raise ConfigError(
            f"the recipe's mixed_precision is {requested}, but DeepSpeed's config says {actual}: change one"
        )
    return "as the DeepSpeed config says"


def check_precision(precision: str) -> None:
    """Raise ConfigError for a precision that training does not support."""
    if precision not in PRECISIONS:
        raise ConfigError(
            f"mixed_precision={precision}, says accelerate or a DeepSpeed config: it must be no or bf16"
        )


def multiplies_bf16(device: str) -> bool:
    """Return whether a device ("cpu", "cuda", "xpu") has instructions for products of bf16 matrices.

    On a CPU ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA count too: a newer CPU that they limit to AVX2 has none.
    """
    match device:
        case "cpu":
            return _cpu_multiplies_bf16()
        case "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        case "xpu":
            return torch.xpu.is_bf16_supported()
    return False


def _cpu_multiplies_bf16() -> bool:
    # torch calls oneDNN for these products, which accepts any CPU with AVX512: without AVX512-BF16 or AMX it
    # converts to float32 and back.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def slow_bf16_warning(device: str) -> str | None:
    """Return a warning, with a ratio measured now, for bf16 on a device where it is slow; else None."""
    if multiplies_bf16(device):
        return None
    ratio = bf16_over_float32(device)
    if ratio <= 1:
        return None
    return (
        f"warning: bf16 is slow on this {shown(device)}: a matrix product takes {ratio:.3g} times as long as in "
        "float32. Faster: mixed_precision=no, and dtype=float32 where the weights are in bf16; in training recipes "
        "engine.mixed_precision and model.dtype, in compare.py complete.mixed_precision and complete.dtype"
    )


def bf16_over_float32(device: str) -> float:
    """Return the time ratio of a small matrix product, bf16 over float32, each the best of a tenth of a second."""
    size = 128 if device == "cpu" else 2048  # CPUs without the instructions need a minute for 2048

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        times = []
        while sum(times) < 0.1 or len(times) < 3:
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            if device != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine the product would often wait for one of several threads
    try:
        return seconds(torch.bfloat16) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def shown(device: str) -> str:
    """Return the display name of a device."""
    return "CPU" if device == "cpu" else "GPU"
