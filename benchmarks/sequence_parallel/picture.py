"""docs/wavefront.png: a traced step, ranks against time, and what the simulation says of other meshes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.sequence_parallel.extrapolate import SCHEDULES
from benchmarks.sequence_parallel.tables import DEVICES
from benchmarks.sequence_parallel.wavefront import spans_of

__all__ = ["draw"]

COLOURS = {"forward": "Blues", "backward": "Oranges"}
STYLES = {"in turn": "-", "4 forwards first": "--", "lock-step": ":"}


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the picture of a record that has a traced step and the extrapolation.

    Raises:
        ValueError: it has not.
    """
    cases = record["cases"]
    traced = [name for name, case in cases.items() if name.startswith("wavefront/") and "spans" in case]
    if not traced or "efficiency" not in cases.get("extrapolation", {}):
        raise ValueError("the record has no traced step or no extrapolation: measure those first")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 7.5), dpi=150, gridspec_kw={"height_ratios": [1.25, 1]}
    )
    _trace(top, *max(((name, cases[name]) for name in traced), key=_preference))
    _efficiency(bottom, cases["extrapolation"])
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _preference(named: tuple[str, dict[str, Any]]) -> tuple[int, bool, bool]:
    """Most ranks first, then in turn, then where the scan is long enough to be seen."""
    _, case = named
    return case["sp"], case["forwards_first"] == 1, case["shares"] == "quarter"


def _trace(axes: Any, name: str, case: dict[str, Any]) -> None:
    """A bar for each layer from its first to its last moment; the scan in black, waiting left white."""
    import matplotlib

    for span in spans_of(case["spans"]):
        shade = 0.25 + 0.7 * span.layer / max(1, case["layers"] - 1)
        colour = matplotlib.colormaps[COLOURS[span.phase]](shade)
        # Waits end where the scan begins (those for a halo are too short to be seen).
        waited = (span.scan_begin - span.waited, span.waited)
        parts = [(span.begin, waited[0] - span.begin), (span.scan_begin, span.end - span.scan_begin)]
        axes.broken_barh(parts, (span.rank - 0.4, 0.8), color=colour, lw=0)
        axes.broken_barh(
            [(span.scan_begin, span.scan_end - span.scan_begin)], (span.rank - 0.4, 0.8), color="black", lw=0
        )
    axes.invert_yaxis()
    axes.set_yticks(range(case["sp"]))
    axes.set_ylabel("sp rank")
    axes.set_xlabel("seconds")
    share = "a quarter of the layer" if case["shares"] == "quarter" else "as measured"
    axes.set_title(
        f"One traced step: sp {case['sp']}, {case['layers']} layers, {case['micro_batches']} micro-batches, "
        f"scan {share}: {case['efficiency']:.2f} of the ideal\n"
        "forward blue, backward orange, darker in later layers; (reverse) scan black; waiting white",
        fontsize=9,
    )


def _efficiency(axes: Any, case: dict[str, Any]) -> None:
    for colour, device in zip(("tab:green", "tab:purple"), DEVICES, strict=True):
        by_length = case["efficiency"][device]
        longest = by_length[max(by_length, key=int)]
        for schedule in SCHEDULES:
            points = sorted((int(sp), both[0]) for sp, both in longest[schedule].items())
            label = f"{DEVICES[device]}: {schedule}"
            axes.plot(*zip(*points), STYLES[schedule], color=colour, marker="o", ms=3, label=label)
    length = max(case["efficiency"]["core"], key=int)
    axes.set_xscale("log", base=2)
    meshes = sorted(map(int, case["efficiency"]["core"][length]["in turn"]))
    axes.set_xticks(meshes, [str(sp) for sp in meshes])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("sp")
    axes.set_ylabel("of the ideal")
    axes.set_title(
        f"Simulated: {case['layers']} layers, {case['micro_batches']} micro-batches, "
        f"T {int(length):,}, gradient sum left out",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=7)
    axes.grid(alpha=0.3)
