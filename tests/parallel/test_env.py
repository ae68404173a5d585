"""Which GPU a rank uses, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from trellis_dist.parallel import env

RANK_OF_FOUR = {"RANK": "3", "WORLD_SIZE": "4"}


def set_up(patch: pytest.MonkeyPatch, variables: dict[str, str], *, gpus: int) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        patch.delenv(name, raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)
    patch.setattr(torch.cuda, "device_count", lambda: gpus)
    patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)


@pytest.mark.parametrize(
    "variables, gpus, device",
    [
        ({}, 0, "cpu"),
        ({}, 8, "cuda:0"),
        (RANK_OF_FOUR | {"LOCAL_RANK": "3"}, 4, "cuda:3"),
        (RANK_OF_FOUR | {"LOCAL_RANK": "3"}, 1, "cuda:0"),
        (RANK_OF_FOUR, 1, "cuda:0"),
        (RANK_OF_FOUR, 0, "cpu"),
        ({"WORLD_SIZE": "4"}, 8, "cuda:0"),
    ],
)
def test_a_rank_uses_the_only_gpu_it_sees_or_that_of_its_local_rank(
    variables: dict[str, str], gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(monkeypatch, variables, gpus=gpus)
    assert env.device() == torch.device(device)


@pytest.mark.parametrize(
    "variables, words",
    [
        (RANK_OF_FOUR, "LOCAL_RANK is not set and rank 3 sees 2 GPUs: start the job with torchrun, set"),
        (RANK_OF_FOUR | {"LOCAL_RANK": "3"}, "LOCAL_RANK 3: rank 3 sees 2 GPUs; start one rank for each GPU"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_refused_in_one_line(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(monkeypatch, variables, gpus=2)
    for ask in (env.device, lambda: env.init_distributed("cuda")):
        with pytest.raises(ValueError, match=words) as error:
            ask()
        assert "\n" not in str(error.value)


def test_what_is_kept_is_made_again_after_it_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_kept", {})
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    assert [env.once("key", make), env.once("key", make)] == [0, 0]
    env.forget()
    assert env.once("key", make) == 1
