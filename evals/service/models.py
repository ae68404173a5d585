"""What goes in and out over HTTP: the source of the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from evals.config import TaskName
from evals.places import NO_STEP
from evals.queue import State

Percent = Annotated[float, Field(description="percent (or percent points)")]
Step = Annotated[
    int | None,
    BeforeValidator(lambda step: None if step == NO_STEP else step),
    Field(description="of training; null of a baseline"),
]
Key = Annotated[str, Field(description="identifies checkpoint, task, settings, tokenizer and data set")]


class Submission(BaseModel):
    """One task on one checkpoint, both by name."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(max_length=128, description="a run's id, as GET /runs lists them")
    task: TaskName
    step: int | None = Field(
        default=None, ge=0, lt=2**63, description="a saved step; the newest unless given"
    )
    priority: int = Field(
        default=1, ge=-100, le=100, description="higher ones first; the service's own are 0"
    )


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Complaint(BaseModel):
    """What is wrong with one part of a request."""

    loc: list[str | int]
    msg: str
    type: str


class Invalid(BaseModel):
    """Why a request is not as documented."""

    detail: list[Complaint]


class Health(BaseModel):
    """What the service is doing."""

    status: str
    jobs: dict[State, int] = Field(description="jobs by state")
    results: int = Field(description="rows of GET /results")
    counters: dict[str, int] = Field(description="what happened since the queue was made")


class RunSteps(BaseModel):
    """The committed checkpoints of a run."""

    steps: list[int]
    tokens: dict[int, int] = Field(description="training tokens by step, where the checkpoint says so")


class RunList(BaseModel):
    """What can be scored."""

    runs: dict[str, RunSteps]
    baselines: list[str] = Field(description="models without steps")
    tasks: list[str]


class Submitted(BaseModel):
    """A job, and whether it was new to the queue."""

    key: Key
    new: bool


class JobEntry(BaseModel):
    """A job of the queue."""

    key: Key
    run: str
    step: Step
    task: str
    state: State
    priority: int
    attempts: int
    error: str | None
    created: float = Field(description="seconds since 1970")
    tokens: int | None


class JobPage(BaseModel):
    """Jobs, newest first; ``total`` counts all that pass the filters."""

    jobs: list[JobEntry]
    total: int


class Cancelled(BaseModel):
    """A job that was taken out of the queue."""

    key: Key
    state: State


class Group(BaseModel):
    """A mean with its 95% interval; null where a task gives none."""

    model_config = ConfigDict(extra="allow")

    score: Percent | None
    low: Percent | None = None
    high: Percent | None = None
    samples: int | None = None


class ResultEntry(BaseModel):
    """A result without its record."""

    key: Key
    run: str
    step: Step
    tokens: int | None
    task: str
    scalars: dict[str, float]
    chance: dict[str, Percent] = Field(description="what a guess would get of those scalars")
    groups: dict[str, Group]
    seconds: float | None = Field(description="how long scoring took")
    created: float = Field(description="seconds since 1970")


class ResultPage(BaseModel):
    """Results, newest first; ``total`` counts all that pass the filters."""

    results: list[ResultEntry]
    total: int


class Record(BaseModel):
    """A result as the task gave it, without its samples."""

    model_config = ConfigDict(extra="allow")


class SampleEntry(BaseModel):
    """A scored question; tasks may add fields."""

    model_config = ConfigDict(extra="allow")

    id: str
    group: str
    score: float = Field(description="from 0 (wrong) to 1 (right)")
    prompt: str
    answer: str = ""
    output: str = ""
    length: int | None = Field(default=None, description="prompt length in tokens")
    depth: float | None = Field(default=None, description="share of the text before what is asked for")
    details: dict[str, Any] = {}


class SamplePage(BaseModel):
    """Samples in the order of scoring; ``total`` counts all that pass the filters."""

    samples: list[SampleEntry]
    total: int
    groups: list[str] = Field(description="all groups of the result")


class Difference(BaseModel):
    """The second result against the first, on the samples that both have."""

    first: Percent
    second: Percent
    difference: Percent
    low: Percent
    high: Percent
    samples: int
    p_better: float = Field(description="share of the resamples in which the second is better")


class Comparison(BaseModel):
    """A paired bootstrap by group."""

    task: str
    groups: dict[str, Difference]


class Series(BaseModel):
    """A scalar of a run by training step."""

    run: str
    name: str
    points: list[tuple[Step, int | None, float]] = Field(description="[step, tokens, value]")


class SeriesList(BaseModel):
    """Curves."""

    series: list[Series]
    thinned: bool = Field(description="whether there are more points than these")
    total: int = Field(description="points in all")


class Cell(BaseModel):
    """The samples of one length and one bin of depths."""

    score: Percent
    samples: int


class Heatmap(BaseModel):
    """Scores by prompt length and depth; empty for a task that varies neither."""

    lengths: list[int]
    depths: list[float] = Field(description="edges of the bins, from 0 to 1")
    cells: list[list[Cell | None]]


class LeaseRequest(BaseModel):
    """A worker asks for a job."""

    model_config = ConfigDict(extra="forbid")

    owner: str = Field(min_length=1, max_length=256)
    seconds: float = Field(gt=0, le=3600)


class RenewRequest(LeaseRequest):
    """A worker is still at work."""

    key: str


class FinishRequest(BaseModel):
    """A worker has a result."""

    model_config = ConfigDict(extra="forbid")

    key: str
    record: dict[str, Any]


class FailRequest(BaseModel):
    """A worker gives a job back."""

    model_config = ConfigDict(extra="forbid")

    key: str
    owner: str
    error: str = Field(max_length=2000)
