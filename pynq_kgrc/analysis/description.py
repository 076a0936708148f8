"""What a program holds, as plain data for a person or another program to read."""

from __future__ import annotations

from typing import Any

from pynq_kgrc.program import ConvTask, Program


def describe(program: Program) -> dict[str, Any]:
    """What a program holds, as plain data: sizes in bytes, operations in MACs."""
    tasks = []
    for task in program.tasks:
        row: dict[str, Any] = {
            "name": task.name,
            "in": [task.shape.channels, *task.shape.in_size],
            "out": [task.shape.out_channels, *task.out_size],
            "kernel": list(task.shape.kernel),
            "stride": list(task.shape.stride),
        }
        if isinstance(task, ConvTask):
            config = program.config
            kr, kc = task.weights.kept
            row["mode"] = task.weights.mode(config.gm, program.group_columns(task))
            row["kept_rows"], row["kept_columns"] = kr, kc
            row["macs_dense"], row["macs_kept"] = task.shape.macs, task.kept_macs
            row["weight_bytes"] = program.weight_bytes(task)
            row["rides"] = [w for w in ("shortcut", "pool") if getattr(task, w) is not None]
        else:
            row["mode"] = "average pool" if task.average else "max pool"
        tasks.append(row)
    dense = sum(row.get("macs_dense", 0) for row in tasks)
    kept = sum(row.get("macs_kept", 0) for row in tasks)
    clip = program.clip
    return {
        "name": program.name,
        "format_version": program.version,
        "accelerator": program.config.name,
        "accelerator_digest": program.config.digest,
        "bits": program.config.bits,
        "clip": {"frames": clip.frames, "height": clip.height, "width": clip.width},
        "classes": len(program.labels),
        "activation_peak_bytes": program.arena_bytes,
        "weight_bytes": sum(row.get("weight_bytes", 0) for row in tasks),
        "macs_dense": dense,
        "macs_kept": kept,
        "tasks": tasks,
    }
