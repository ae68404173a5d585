"""The service keeps the promises of its own OpenAPI document, for requests that follow it and that do not."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from schemathesis import GenerationMode

from evals.queue import Queue
from evals.samples import Sample
from evals.service import create_app
from evals.watch import Runs
from tests.evals.conftest import write_run

EXAMPLES = 20
ALLOWED = {"Authorization": "Bearer t0k3n"}


def store(queue):
    queue.submit("d", run="tiny", step=8, task="sample")
    for key, task in (("a", "sample"), ("b", "sample"), ("c", "decode")):
        queue.submit(key, run="tiny", step=7, task=task, tokens=70)
        samples = [
            Sample(
                id=str(i), group="g", score=i / 3, prompt="p", answer="a", output="o", length=512, depth=0.5
            )
            for i in range(4)
        ]
        groups = {"g": {"score": 50.0, "low": 1.0, "high": 99.0, "samples": 4}}
        result = {"groups": groups, "samples": [sample.to_json() for sample in samples]}
        queue.finish(key, {"seconds": 1.0, "result": result, "scalars": {"g/acc": 50.0}})


@pytest.fixture(scope="module")
def schema(dataset_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    write_run(folder / "runs" / "tiny", dataset_dir)
    queue = Queue(folder / "queue.sqlite")
    store(queue)
    app = create_app(queue, Runs(folder / "runs"), token="t0k3n")
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=ALLOWED)


@pytest.fixture(autouse=True)
def the_same_requests(monkeypatch):
    """The seed decides alone: hypothesis would also draw constants of whatever the process has imported."""
    monkeypatch.setattr(providers, "_get_local_constants", Constants)
    providers.CONSTANTS_CACHE.cache.clear()
    yield
    providers.CONSTANTS_CACHE.cache.clear()


def operations(schema):
    return [found.ok() for found in schema.get_all_operations()]


def test_the_document_names_every_endpoint(schema):
    assert {(op.method.upper(), op.path) for op in operations(schema)} == {
        ("GET", "/health"),
        ("GET", "/runs"),
        ("POST", "/jobs"),
        ("GET", "/jobs"),
        ("GET", "/jobs/{key}"),
        ("DELETE", "/jobs/{key}"),
        ("GET", "/results"),
        ("GET", "/results/{key}"),
        ("GET", "/results/{key}/samples"),
        ("GET", "/compare"),
        ("GET", "/scalars"),
        ("GET", "/heatmap/{key}"),
        ("GET", "/metrics"),
    }


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("index", range(13))
def test_answers_are_as_documented(schema, index, mode):
    operation = operations(schema)[index]
    statuses = set()

    @seed(0)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def check(case, data):
        if mode is GenerationMode.POSITIVE:
            name_what_is_there(case, data)
        statuses.add(case.call_and_validate(headers=ALLOWED).status_code)

    check()
    assert statuses
    if mode is GenerationMode.NEGATIVE:
        assert max(statuses) >= 400
    else:
        assert min(statuses) < 300, "no request got to what it is about"


def name_what_is_there(case, data):
    """Random keys and runs are never there: half of the requests get real ones."""
    places = [place for place in (case.path_parameters, case.query) if place]
    named = [(place, name) for place in places for name in ("key", "first", "second") if name in place]
    if named and data.draw(st.booleans()):  # all of them: one alone finds nothing to compare with
        for place, name in named:
            place[name] = data.draw(st.sampled_from("abcd"))
    if case.method == "POST" and isinstance(case.body, dict) and data.draw(st.booleans()):
        case.body.update(run="tiny", step=None)
