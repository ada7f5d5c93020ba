# SPDX-License-Identifier: MIT
"""``python -m convnn_kernels.info [--json]``: what was built and what can run here."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from convnn_kernels import introspect, native
from convnn_kernels.backends import gradients, hopper, selection
from convnn_kernels.version import __version__


def collect() -> dict[str, Any]:
    """The report as JSON values.

    A version or a machine's property is None where there is none; a backend is None where nothing
    keeps it from running here. The kernels for Hopper and the gradients in CUDA C++ are checked
    on each device where they may be chosen.
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "convnn_kernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torch_cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        "machine": {
            "platform": platform.platform(),
            "cpu_instruction_set": native.cpu_instruction_set() or None,
            "cpu_choice": native.cpu_choice() or None,
            "cpu_threads": torch.get_num_threads(),
            "cuda_devices": devices,
        },
        "build": {**native.build_report(), **_introspect()},
        "backends": selection.available(),
        "hopper": {
            "unavailable": hopper.unavailable(),
            "takes": hopper.TAKES,
            "devices": hopper.report(),
        },
        "gradients": {"takes": gradients.TAKES, "devices": gradients.report()},
    }


def _version(distribution: str) -> str | None:
    # From the metadata, because importing Triton is slow.
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _introspect() -> dict[str, Any]:
    if not native.build_report():
        return {}
    return {
        "compiler": introspect.compiler(),
        "cpu_instruction_sets": introspect.cpu_instruction_sets(),
        "cuda_architectures": introspect.cuda_architectures(),
        "cuda_kernels": introspect.cuda_kernels(),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text, one fact per line."""
    versions, machine, build = report["versions"], report["machine"], report["build"]
    devices = ", ".join(machine["cuda_devices"]) or "none"
    instruction_set = machine["cpu_instruction_set"] or (
        f"none: CONVNN_CPU_ISA is {os.environ.get('CONVNN_CPU_ISA')!r}, but what runs here is "
        f"{', '.join(native.usable_cpu_instruction_sets())}"
    )
    sections = {
        "versions": {
            "convnn_kernels": versions["convnn_kernels"],
            "Python": versions["python"],
            "PyTorch": f"{versions['torch']} (CUDA {versions['torch_cuda'] or 'none'})",
            "Triton": versions["triton"] or "not installed",
        },
        "machine": {
            "platform": machine["platform"],
            "CPU kernels": f"{instruction_set}, {machine['cpu_threads']} threads",
            **_choice(machine["cpu_choice"]),
            "CUDA devices": devices,
        },
        "built": {
            "compiler": build.get("compiler", "unknown"),
            "against": f"PyTorch {build.get('torch', 'unknown')}",
            **{part: _outcome(build.get(part)) for part in ("cpu", "cuda", "introspect")},
        },
        "backends that can run here": {
            name: f"no: {reason}" if reason else "yes"
            for name, reason in report["backends"].items()
        },
    }
    hopper_kernels = report["hopper"]
    reason = hopper_kernels["unavailable"] or "there is no device of compute capability 9.0"
    sections["kernels for Hopper (cuda)"] = {"take": hopper_kernels["takes"]} | (
        hopper_kernels["devices"] or {"here": f"no: {reason}"}
    )
    if on_devices := report["gradients"]["devices"]:
        takes = {"may take": report["gradients"]["takes"]}
        sections["gradients in CUDA C++ instead of Triton's"] = takes | on_devices
    lines = []
    for title, facts in sections.items():
        lines.append(title)
        lines += [f"  {name:<16}{fact}" for name, fact in facts.items()]
    return "\n".join(lines)


def _choice(choice: dict[str, Any] | None) -> dict[str, str]:
    """How the instruction set of the CPU kernels was chosen."""
    if not choice or choice["source"] == "only":
        return {}
    reasons = {
        "requested": "by CONVNN_CPU_ISA",
        "default": "by default, because measuring failed",
        "measured": f"as the fastest, measured in {choice['milliseconds'] or 0:.0f} ms",
        "remembered": "as the fastest, measured before",
    }
    text = reasons[choice["source"]]
    name, times = choice["instruction_set"], choice["picoseconds"]
    if times:
        others = (f"{each} {times[each] / times[name]:.2f}" for each in times if each != name)
        text += f" ({', '.join(others)} times as long)"
    if choice["is_kept"]:
        text += f"; delete {choice['file']} to measure again"
    elif choice["source"] == "measured":
        file = choice["file"]
        no_folder = "CONVNN_CACHE or HOME must be the absolute path of a folder"
        text += f"; not remembered: {f'cannot write {file}' if file else no_folder}"
    return {"chosen": text}


def _outcome(part: dict[str, str] | None) -> str:
    if part is None:
        return "unknown"
    return part["built"] if "built" in part else f"no: {part['skipped']}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convnn_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args().json else render(report))


if __name__ == "__main__":
    main()
