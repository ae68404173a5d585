"""A record as markdown: what the command prints at its end, and what docs/performance.md shows.

A file's keys come sorted, so the order of rows and columns is taken from the settings or from the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.kernels.contenders import CPU_CONTENDERS
from benchmarks.kernels.gpu import GpuPlan, case_name, rival_name
from benchmarks.kernels.sizes import Shape, arithmetic, floor_bytes
from benchmarks.kernels.targets import floors

__all__ = ["floor_table", "render"]


def render(record: dict[str, Any]) -> str:
    """All tables of a record, complete or not. Raises ValueError for what is no record."""
    parts = {"cpu": _cpu, "gpu": _gpu}
    if not isinstance(record, dict) or record.get("part") not in parts:
        raise ValueError("this is no record of python -m benchmarks.kernels: it has no part cpu or gpu")
    sections = parts[record["part"]](record)
    sections += [("Targets", _targets(record))]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in sections if table) + "\n"


def floor_table(plan: GpuPlan, *, bytes_per_second: float, flops_per_second: float) -> str:
    """Floors of every size at given ceilings, without the scan's latency: nothing is measured for them."""
    rows = []
    for shape in plan.own:
        size, flops = floor_bytes(shape, 2), arithmetic(shape)
        row = [_label(shape)]
        for part in ("forward", "backward"):
            by_bytes = [1e3 * size[part][kind] / bytes_per_second for kind in ("least", "staged")]
            row += [f"{ms:.3f}" for ms in (*by_bytes, 1e3 * flops[part] / flops_per_second)]
        rows.append(row)
    columns = [
        f"{part}: {what}" for part in ("forward", "backward") for what in ("least", "staged", "arithmetic")
    ]
    return _table(["", *columns], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) if rows else ""


def _time(found: dict[str, float], digits: int = 1) -> str:
    """Median (tenth - ninetieth percentile)."""
    return f"{found['median']:.{digits}f} ({found['p10']:.{digits}f} - {found['p90']:.{digits}f})"


def _targets(record: dict[str, Any]) -> str:
    verdicts = {True: "met", False: "missed", None: "-"}
    rows = []
    for target in record.get("targets", []):
        measured = target["note"] if target["measured"] is None else f"{target['measured']:.3g}"
        bound = "-" if target["bound"] is None else f"{target['bound']:.3g}"
        verdict = "not measured" if target["measured"] is None else verdicts[target["met"]]
        rows.append([target["name"], measured, bound, verdict])
    return _table(["target", "measured", "bound", "verdict"], rows)


def _cpu(record: dict[str, Any]) -> list[tuple[str, str]]:
    cases = record["cases"]
    found = []
    for name in sorted(cases):
        case = cases[name]
        if name.startswith("side by side/") and "ms" in case:
            title = f"Forward and backward, ms, threads: {case['threads']}"
            rows = [
                [
                    who,
                    *(_time(case["ms"][who][part]) for part in ("forward", "backward", "both")),
                    _time(case["times_chunkwise"][who], 2),
                ]
                for who in CPU_CONTENDERS
            ]
            head = ["", "forward", "backward", "both", "both / chunkwise, round by round"]
            found.append((title, _table(head, rows)))
    found.append(("Memory of the same call, MiB", _memory(cases)))
    found.append(("Forward + backward, microseconds per token against T, 1 thread", _lengths(cases)))
    decode = cases.get("decode", {}).get("microseconds_per_token", {})
    rows = [[at, _time(decode[at])] for at in sorted(decode, key=int)]
    found.append(
        ("Decode step, microseconds per token and layer, 1 thread", _table(["position", "time"], rows))
    )
    for kind in ("bf16", "fp32"):
        case = cases.get(f"saved for backward/layer in {kind}", {})
        found.append((f"Saved for backward, bytes per token and layer, {kind} operands", _saved(case)))
    return [*found, ("Decoding, bytes held per layer and sequence", _decoding(cases))]


def _memory(cases: dict[str, Any]) -> str:
    held = cases.get("saved for backward/chunkwise, plain loops", {}).get("bytes", {})
    rows = []
    for who in CPU_CONTENDERS:
        case = cases.get(f"peak memory/{who}", {})
        if "bytes" in case and who in held:
            peak = [f"{case['bytes'][part]['median'] / 2**20:.0f}" for part in ("peak", "after_forward")]
            rows.append([who, *peak, *(f"{held[who][part] / 2**20:.1f}" for part in ("operands", "own"))])
    head = ["", "peak over the operands", "of it after forward", "saved: operands", "saved: own"]
    return _table(head, rows)


def _lengths(cases: dict[str, Any]) -> str:
    found = cases.get("time against length", {}).get("microseconds_per_token", {})
    updates = [update for update in ("stale", "corrected") if update in found]
    lengths = sorted(found[updates[0]], key=int) if updates else []
    rows = [[update, *(_time(found[update][length]) for length in lengths)] for update in updates]
    return _table(["T", *lengths], rows)


def _saved(case: dict[str, Any]) -> str:
    if "bytes_per_token" not in case:
        return ""
    rows = []
    for chunk in sorted(case["bytes_per_token"], key=int):
        sizes = case["bytes_per_token"][chunk]
        measured, formula = sizes["measured"], sizes["formula"]
        operands, own = measured["operands"], measured["own"]
        by_formula = formula["operands"] + formula["own"]
        others = (formula["operands"] + formula[kept] for kept in ("own_triton", "every_chunk_start"))
        numbers = (operands, own, operands + own, by_formula, *others)
        rows.append([f"C {chunk}", *(f"{x:.0f}" for x in numbers)])
    attention = case["attention"]
    rows.append(["attention", "", "", f"{attention['measured']:.0f}", f"{attention['formula']:.0f}", "", ""])
    head = ["", "operands", "memories", "sum", "formula", "triton, formula", "if every chunk start were kept"]
    return _table(head, rows)


def _decoding(cases: dict[str, Any]) -> str:
    found = cases.get("saved for backward/layer in bf16", {}).get("decoding")
    if found is None:
        return ""
    rows = [
        [f"{length} tokens", str(found["state"]), str(length * found["attention_per_token"])]
        for length in (1024, 32768, 1 << 20)
    ]
    return _table(["after", "state", "attention's keys and values, bf16"], rows)


def _gpu(record: dict[str, Any]) -> list[tuple[str, str]]:
    plan, cases = GpuPlan.of_json(record["settings"]), record["cases"]
    found = [("Ceilings, measured first", _ceilings(cases))]
    found.append(("The operation, ms", _own(plan, cases)))
    found.append(("Forward + backward beside the rivals, ms", _rivals(plan, cases)))
    found.append(("Decode step, microseconds per layer", _decode(plan, cases)))
    found.append(("The scans alone, microseconds per chunk", _latencies(plan, cases)))
    rows = [[name, cases[name]["error"]] for name in sorted(cases) if "error" in cases[name]]
    return [*found, ("Not measured", _table(["case", "why"], rows))]


def _decode(plan: GpuPlan, cases: dict[str, Any]) -> str:
    rows = []
    for shape in plan.decodes:
        times = cases.get(f"decode/B {shape.batch}", {}).get("microseconds")
        if times is not None:
            rows.append([f"B {shape.batch}", _time(times["graph"]), _time(times["eager"])])
    return _table(["", "graph replay", "eager"], rows)


def _latencies(plan: GpuPlan, cases: dict[str, Any]) -> str:
    parts, rows = ("forward", "again", "reverse"), []
    for shape in plan.latencies:
        times = cases.get(case_name("scan latency", shape), {}).get("microseconds_per_chunk")
        if times is not None:
            rows.append([_label(shape), *(f"{times[part]:.2f}" for part in parts)])
    return _table(["", "forward", "again in backward", "reverse"], rows)


def _label(shape: Shape) -> str:
    return f"{shape.name}, C {shape.chunk}, {shape.update}"


def _ceilings(cases: dict[str, Any]) -> str:
    found = cases.get("ceilings", {})
    if "bytes_per_second" not in found:
        return ""
    row = [f"{found['bytes_per_second'] / 1e12:.2f}", f"{found['flops_per_second'] / 1e12:.0f}"]
    return _table(["copy, TB/s read + written", "bf16 product, TFLOP/s"], [row])


def _own(plan: GpuPlan, cases: dict[str, Any]) -> str:
    rows = []
    for shape in plan.own:
        case = cases.get(case_name("compress", shape), {})
        if "ms" not in case:
            continue
        ms, floor = case["ms"], floors(cases, shape)
        moved = sum(case["floor_bytes"][part]["staged"] for part in ("forward", "backward"))
        share = "-" if floor is None else f"{100 * floor['both'] / ms['both']['median']:.0f}%"
        by_part = "-" if floor is None else f"{floor['forward']:.3f} + {floor['backward']:.3f}"
        state = ("" if case["exact"] else "WRONG ") + ("" if case["bitwise_repeatable"] else "NOT REPEATABLE")
        rows.append(
            [
                _label(shape),
                *(_time(ms[part], 3) for part in ("forward", "backward", "both")),
                by_part,
                f"{moved / ms['both']['median'] / 1e9:.2f}",
                share,
                f"{ms['submit']['median']:.2f}",
                state.strip() or "yes",
            ]
        )
    head = [
        "",
        "forward",
        "backward",
        "both",
        "floor",
        "TB/s",
        "of the roofline",
        "host",
        "exact, repeatable",
    ]
    return _table(head, rows)


def _rivals(plan: GpuPlan, cases: dict[str, Any]) -> str:
    rows = []
    for sizes in plan.shapes:
        shapes = [plan.shape(sizes, chunk) for chunk in plan.chunks]
        names = {f"ours, C {s.chunk}": case_name("compress", s) for s in shapes}
        names |= {f"ttt_linear, C {s.chunk}": rival_name("ttt_linear", s) for s in shapes}
        for rival in ("chunk_gsa", "chunk_gated_delta_rule", "attention"):
            names[rival] = rival_name(rival, shapes[0])
        medians = [cases.get(name, {}).get("ms", {}).get("both", {}).get("median") for name in names.values()]
        rows.append([shapes[0].name, *("-" if ms is None else f"{ms:.3f}" for ms in medians)])
    return _table(["", *names], rows)
