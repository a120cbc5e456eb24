"""Where the time of a run goes, by kind of operation."""

from __future__ import annotations

from collections.abc import Callable

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_int_mm"),
    "attention": ("scaled_dot_product", "flash_attn", "flash_fwd", "flash_bwd", "fmha", "efficient_attention"),
    "moving numbers": (
        "aten::index",
        "aten::copy_",
        "aten::cat",
        "aten::gather",
        "aten::scatter",
        "aten::fill_",
        "aten::zero",
        "aten::embedding",
    ),
}
OTHER = "everything else"


def time_shares(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the time that PyTorch's profiler sees in a run; they add up to 1. On a GPU: of the time of kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiled:
        run()
    seen = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profiled.key_averages():
        # On a GPU an operation is charged for the kernels that it launched.
        seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if not on_gpu or event.key.startswith("aten::"):
            seen[kind_of(event.key)] += seconds
    total = sum(seen.values())
    return {kind: seconds / total for kind, seconds in seen.items()}


def kind_of(operation: str) -> str:
    """The kind that an operation's name belongs to."""
    for kind, parts in KINDS.items():
        if any(operation == part or (kind != "matrix products" and part in operation) for part in parts):
            return kind
    return OTHER
