"""What every benchmark's JSON says about where it ran."""

from __future__ import annotations

from launch.machine import PACKAGES, machine, versions

__all__ = ["PACKAGES", "machine", "versions"]
