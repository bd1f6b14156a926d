"""Report of a plan: as text, as JSON, and as a recipe for --config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from megatron_slm.config.constraints import flag_name
from megatron_slm.config.recipe import settings as all_settings
from megatron_slm.model.size import checkpoint_bytes, parameter_count
from megatron_slm.planning.communication import step_messages
from megatron_slm.planning.devices import GIB
from megatron_slm.planning.efficiencies import Measurement
from megatron_slm.planning.flops import step_flops
from megatron_slm.planning.search import Plan, Rejection, Remedy
from megatron_slm.planning.step_time import find_efficiency, model_flops_utilization

DAY = 86400.0
WRITE_BANDWIDTH = 1e10  # bytes/s of the file system: an assumption, --write-gb-per-second


def plan_values(plan: Plan, write_bandwidth: float = WRITE_BANDWIDTH, *, with_time: bool = True) -> dict[str, Any]:
    """Return all values of a plan, in bytes and seconds."""
    layout, memory, flops = plan.layout, plan.memory, step_flops(plan.layout)
    size = checkpoint_bytes(layout.config, layout.vocab_size)
    values: dict[str, Any] = {
        "settings": plan.settings,
        "layout": {
            "gpus": layout.world_size,
            "gpu": layout.device.name,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_stages": layout.virtual,
            "context": layout.context,
            "data": layout.data,
            "micro_batches": layout.micro_batches,
        },
        "parameters": parameter_count(layout.config.model, layout.padded_vocab),
        "memory": {
            "fits": plan.fits,
            "usable": layout.device.usable,
            "device": layout.device.memory,
            "total": memory.total,
            "stage": memory.stage,
            "moment": memory.moment,
            "parts": memory.parts,
        },
        "flops": {**vars(flops), "computed": flops.computed},
        "messages": [{**vars(messages), "sent": messages.sent} for messages in step_messages(layout)],
        "checkpoint": {"bytes": size, "seconds": size / write_bandwidth},
    }
    if with_time:
        values["time"] = _time_values(plan)
    return values


def _time_values(plan: Plan) -> dict[str, Any]:
    layout, time = plan.layout, plan.time
    steps = layout.config.training.train_iters
    values: dict[str, Any] = {
        "step": time.total,
        "parts": vars(time),
        "tokens_per_second": layout.step_tokens / time.total,
        "tokens_per_second_per_gpu": layout.step_tokens / time.total / layout.world_size,
        "days": steps * time.total / DAY,
        "steps": steps,
        "tokens": steps * layout.step_tokens,
        "bubble_share": time.bubble / time.total,
        "threshold_share": time.threshold / time.total,
    }
    if layout.device.is_gpu:
        efficiency = find_efficiency(layout)
        values["mfu"] = model_flops_utilization(layout, time.total)
        values["efficiency"] = {
            "value": efficiency.value,
            "note": efficiency.note,
            "rows": [_describe(row) for row in efficiency.rows],
        }
    return values


def recipe(plan: Plan) -> str:
    """Return the searched settings as YAML, to be passed on as the last --config."""
    return yaml.safe_dump(plan.settings, sort_keys=False)


def flags(plan: Plan) -> str:
    """Return the searched settings as flags; settings without a value cannot be flags, and remain as given."""
    names = {setting.name: flag_name(setting) for _, setting, _ in all_settings()}
    return " ".join(_flag(names[name], value) for name, value in plan.settings.items() if value is not None)


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else name.replace("--", "--no-", 1)
    return f"{name} {value}"


def _describe(row: Measurement) -> str:
    return f"{row.name} on {row.gpus} {row.device}, {row.precision} ({row.source})"


def text(values: dict[str, Any], title: str) -> list[str]:
    """Return the lines of a plan's report."""
    layout, memory, flops = values["layout"], values["memory"], values["flops"]
    settings = values["settings"]
    virtual = f" x {layout['virtual_stages']} virtual stages" if layout["virtual_stages"] > 1 else ""
    lines = [
        f"{title}: TP {layout['tensor']} x PP {layout['pipeline']}{virtual} x CP {layout['context']} x DP "
        f"{layout['data']} = {layout['gpus']} {layout['gpu']}",
        f"  micro-batch {settings['micro_batch_size']}, {layout['micro_batches']} per step, recomputation "
        f"{settings['recompute_granularity'] or 'off'}; {values['parameters']:,} parameters",
        f"memory per rank: {memory['total'] / GIB:.2f} GiB of {memory['usable'] / GIB:.1f} usable"
        f"{'' if memory['fits'] else ', INSUFFICIENT'}; largest on stage {memory['stage']}: {memory['moment']}",
    ]
    lines += [f"  {name:<16}{size / GIB:>9.2f} GiB" for name, size in memory["parts"].items() if size]
    lines.append(f"FLOPs per step: {flops['computed']:.3g}, of which the model's {flops['model']:.3g}")
    names = {"recomputation": "recomputation", "ranking": "ranking pass", "reference": "reference model"}
    names["filtered"] = "backward pass of unselected tokens"
    lines += [f"  {label:<36}{flops[name]:+.3g}" for name, label in names.items() if flops[name]]
    checkpoint = values["checkpoint"]
    if "time" in values:
        lines += _time_lines(values["time"])
    seconds = checkpoint["seconds"]
    lines.append(f"checkpoint: {checkpoint['bytes'] / GIB:.1f} GiB, {seconds:.0f} s to write (--write-gb-per-second)")
    return lines + _message_lines(values["messages"])


def _time_lines(time: dict[str, Any]) -> list[str]:
    lines = [
        f"step: {time['step']:.3g} s, {time['tokens_per_second']:,.0f} tokens/s "
        f"({time['tokens_per_second_per_gpu']:,.0f} per rank)"
        + (f", MFU {100 * time['mfu']:.1f} %" if "mfu" in time else "")
        + f"; {time['steps']:,} steps of {time['tokens']:,} tokens: {time['days']:.2f} days"
    ]
    lines += [
        f"  {name:<16}{seconds:>10.4g} s {100 * seconds / time['step']:>6.2f} %"
        for name, seconds in time["parts"].items()
        if seconds
    ]
    if "efficiency" in time:
        efficiency = time["efficiency"]
        note = f" ({efficiency['note']})" if efficiency["note"] else ""
        lines.append(f"matrix products at {100 * efficiency['value']:.1f} % of the peak{note}, from:")
        lines += [f"  {row}" for row in efficiency["rows"]]
    return lines


def _message_lines(messages: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["messages of a rank of the first stage per step:"] if messages else []
    return lines + [
        f"  {found['purpose']:<20}{found['count']:>7,} x {found['operation']} of {found['bytes']:,} bytes over "
        f"{found['group']:,} ranks"
        for found in messages
    ]


def rejection_lines(found: Sequence[Rejection]) -> list[str]:
    """Return the lines on the plan's neighbors."""
    names = {setting.name: flag_name(setting) for _, setting, _ in all_settings()}
    lines = ["rejected:"]
    for rejection in found:
        name, value = next(iter(rejection.settings.items()))
        if name == "recompute_granularity":
            value = " ".join(str(given) for given in rejection.settings.values() if given is not None) or None
        lines.append(f"  {names[name]} {'off' if value is None else value}: {rejection.reason}")
    return lines


def remedy_lines(found: Sequence[Remedy]) -> list[str]:
    """Return the lines on changes with which a run would fit."""
    lines = ["no layout fits. In the order in which to try them:"]
    for remedy in found:
        plan = remedy.plan
        if plan is None:
            lines.append(f"  {remedy.name}: not sufficient")
        else:
            lines.append(f"  {remedy.name}: fits in {plan.memory.total / GIB:.1f} GiB ({flags(plan)})")
    return lines
