"""The checkpoint section of a recipe refuses what makes no sense, naming key, value and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoints.config import CheckpointConfig, check_url


def test_what_makes_sense_is_accepted() -> None:
    assert CheckpointConfig().interval >= 1
    assert CheckpointConfig(keep=0).keep == 0
    assert CheckpointConfig(interval=10, keep_every=30, keep_best=2, best_mode="max").keep_every == 30


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"interval": 0}, r"checkpoint\.interval = 0: use 1"),
        ({"keep": -1}, r"checkpoint\.keep = -1: use 0"),
        ({"keep_every": -1}, r"checkpoint\.keep_every = -1: use 0"),
        ({"keep_best": -2}, r"checkpoint\.keep_best = -2: use 0"),
        ({"keep": 0, "keep_best": 2}, r"checkpoint\.keep_best = 2 adds nothing to checkpoint\.keep = 0"),
        ({"interval": 10, "keep_every": 25}, r"keep_every = 25 is no multiple of .*interval = 10.*multiple"),
        ({"best_metric": ""}, r'checkpoint\.best_metric = "": name one'),
        ({"best_mode": "least"}, r'checkpoint\.best_mode = \'least\': use "min" or "max"'),
        ({"upload": "bucket/run"}, r"checkpoint\.upload = a text is not one plain URL: use s3://"),
        ({"grace_s": 0.0}, r"checkpoint\.grace_s = 0\.0: use"),
        ({"grace_s": float("nan")}, r"checkpoint\.grace_s = nan: use"),
    ],
)
def test_what_makes_none_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CheckpointConfig(**fields)


@pytest.mark.parametrize("url", ["s3://bucket/run", "file:///data/run", "memory://a", "ssh://me@host/run"])
def test_plain_urls(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hunter2@bucket/run",
        "ftp://user:hun/ter2@host/run",
        "https://store/run?token=hunter2",
        "user:hunter2@bucket/run?x",
        "filecache::s3://bucket/hunter2",
        "s3://bucket/hunter2 and more",
    ],
)
def test_secrets_are_refused_and_never_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="plain URL") as caught:
        check_url(url)
    assert "hun" not in str(caught.value)
