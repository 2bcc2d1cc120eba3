"""Which dtype this machine computes in, and why."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def has_bf16_cpu() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AMX or AVX512-BF16)."""
    capability = torch.cpu.get_capabilities()
    return bool(capability.get("amx_bf16") or capability.get("avx512_bf16"))


def best_dtype() -> tuple[torch.dtype, str]:
    """The dtype of ``dtype: auto`` and the reason, in words for a log."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, f"bfloat16: {torch.cuda.get_device_name(0)} supports it"
        return torch.float32, f"float32: {torch.cuda.get_device_name(0)} has no bfloat16"
    if torch.backends.mps.is_available():
        return torch.float32, "float32: no CUDA device; bfloat16 on Apple GPUs is untested here"
    if has_bf16_cpu():
        return torch.bfloat16, "bfloat16: this CPU multiplies bf16 in hardware (AMX or AVX512-BF16)"
    return torch.float32, "float32: this CPU has neither AMX nor AVX512-BF16"


def resolve_dtype(name: str) -> tuple[torch.dtype, str]:
    """``auto`` or a dtype's name, with the reason."""
    return best_dtype() if name == "auto" else (DTYPES[name], f"{name}: asked for")
