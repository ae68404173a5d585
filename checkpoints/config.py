"""The checkpoint section of a recipe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from trellis_dist.validation import STRICT, require

__all__ = ["CheckpointConfig", "check_url"]

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s?#]+")
PASSWORD = re.compile(r"://[^@]*:[^@]*@")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run's state is saved and how many saves are kept.

    Attributes:
        interval: steps between saves; the last step is always saved.
        keep: newest checkpoints kept; 0 keeps all.
        keep_every: also keep every step that is a multiple of this; 0 keeps none for that reason.
        keep_best: also keep this many steps that are best by best_metric; 0 keeps none for that reason.
        best_metric: which of the metrics measured at a saved step is compared; a step at which it was not
            measured does not compete, so let training.validation_interval divide the interval.
        best_mode: whether the "min" or the "max" of best_metric is best.
        upload: URL of a folder in an object store (s3://bucket/run, gs://..., file:///...) that each
            checkpoint is copied to after its commit; "" copies nothing. Credentials belong in the store's own
            configuration, not here.
        background: save while training goes on; False lets training wait for each save.
        grace_s: seconds between SIGTERM or SIGUSR1 and the end of the run that its scheduler grants.
    """

    __pydantic_config__ = STRICT

    interval: int = 1000
    keep: int = 3
    keep_every: int = 0
    keep_best: int = 0
    best_metric: str = "loss/validation"
    best_mode: Literal["min", "max"] = "min"
    upload: str = ""
    background: bool = True
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense, with key, value and remedy."""
        require(self.interval >= 1, f"checkpoint.interval = {self.interval}: use 1 or more steps")
        require(self.keep >= 0, f"checkpoint.keep = {self.keep}: use 0 (all) or more")
        for name in ("keep_every", "keep_best"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name} = {value}: use 0 (off) or more")
            require(
                value == 0 or self.keep > 0,
                f"checkpoint.{name} = {value} adds nothing to checkpoint.keep = 0, which keeps all: "
                "set checkpoint.keep to 1 or more",
            )
        require(
            self.keep_every % self.interval == 0,
            f"checkpoint.keep_every = {self.keep_every} is no multiple of checkpoint.interval = "
            f"{self.interval}, so most of those steps are never saved: use a multiple",
        )
        require(
            self.best_metric != "", 'checkpoint.best_metric = "": name one, "loss/validation" for example'
        )
        require(
            self.best_mode in ("min", "max"),
            f'checkpoint.best_mode = {self.best_mode!r}: use "min" or "max"',
        )
        if self.upload:
            check_url(self.upload)
        require(
            math.isfinite(self.grace_s) and self.grace_s > 0,
            f"checkpoint.grace_s = {self.grace_s}: use the scheduler's seconds, more than 0",
        )


def check_url(url: str) -> None:
    """Check that `url` is one plain URL without secrets; the message never repeats what could be one.

    Raises:
        ValueError: no URL, a chain of them, a password, or a query.
    """
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url)
    shown = f"{scheme[0]}..." if scheme else "a text"
    if PASSWORD.search(url) or "?" in url:
        raise ValueError(
            f"checkpoint.upload = {shown} holds credentials or a query, which would end up in logs: "
            "give the plain URL, and the credentials in the store's own configuration or environment"
        )
    if "::" in url or not URL.fullmatch(url):
        raise ValueError(
            f"checkpoint.upload = {shown} is not one plain URL: use s3://bucket/folder, gs://bucket/folder "
            "or file:///folder"
        )
