"""The evaluation page in a real browser, against the real service with synthetic results."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from evals.compare import compare
from evals.places import Place
from evals.results import Results
from tests.evals.conftest import write_run
from tests.evals.page_data import HOSTILE, LENGTHS, write_database
from tests.evals.page_service import BROWSER, Service, open_browser
from trellis_dist.files import digest

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")

BAD = f"bad-{HOSTILE}"
QUALITY = {"trellis": 0.9, "deltanet": 0.6, "linear": 0.3, BAD: 0.5}
STEPS = (1000, 2000)
VIEWS = ("leaderboard", "curves", "heatmap", "samples", "compare", "queue")
TASK = "niah_single_1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("page")
    write_run(root / "runs" / "tiny", dataset_dir)
    write_database(
        root / "queue.sqlite",
        now=time.time(),
        runs=QUALITY,
        steps=STEPS,
        baselines={"peer": 0.95},
        samples=20,
        odd=HOSTILE,
    )
    return root


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    service = Service(folder)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


class Tab:
    """A page that keeps what it complains about."""

    def __init__(self, browser: Any, *, width: int = 1440, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(f"{request.method} {request.url}"))

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, url: str) -> Any:
        self.page.goto(url)
        self.page.wait_for_selector("#status[data-state=live]")
        return self.page


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.context.close()
    assert tab.complaints == []


def expect(locator: Any) -> Any:
    """Assertions that wait until they hold."""
    from playwright.sync_api import expect

    return expect(locator)


def counts(page: Any, selector: str, count: int) -> None:
    expect(page.locator(selector)).to_have_count(count)


def names(page: Any) -> Any:
    return page.locator(".board tbody tr:not(.baseline) th")


def params(page: Any) -> str:
    return unquote(page.url.partition("#")[2])


def test_the_leaderboard_sorts_filters_and_tells_intervals(tab: Tab, service: Service) -> None:
    page = tab.open(service.url("leaderboard"))
    page.wait_for_selector(".board tbody tr")
    expect(names(page)).to_have_text(["trellis", "deltanet", BAD, "linear", "peer"])
    assert page.locator(".board tr.baseline th").all_inner_texts() == ["bigram", "chance"]
    expect(page.locator(".note").first).to_contain_text("4 checkpoints of 4 runs, 1 baseline,")
    assert page.locator("tr[data-key='peer@-'] td").all_inner_texts()[:3] == ["", "", "-"]
    page.goto(service.url("leaderboard?tasks=winogrande,niah_single_1"))
    guess = page.locator(".board tr", has_text="chance").locator("td[data-column]")
    expect(guess).to_have_text(["50.0", *["0.0"] * 4, *["10.0"] * 4])
    page.goto(service.url("leaderboard"))
    assert page.locator("tr[data-key='trellis@2000'] td[data-column='0'] strong").count() == 1
    assert page.locator("tr[data-key='linear@2000'] td[data-column='0'] strong").count() == 0
    page.get_by_role("button", name="state, MiB").click()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("state, MiB")
    assert "sort=decode/state_bytes" in params(page)
    page.get_by_label("Runs").fill("/^(tre|lin)/")
    counts(page, ".board tbody tr:not(.baseline)", 2)
    page.get_by_role("button", name="Retrieval").click()
    heads = page.locator(".board thead tr").first.locator("th")
    expect(heads).to_have_text(["niah_single_1", "niah_single_2", "niah_multikey_1"])
    cell = page.locator("tr[data-key='trellis@2000'] td[data-column='0']")
    cell.focus()
    read_out = page.locator("#tip")
    expect(read_out).to_contain_text(f"{TASK}/generation/1024")
    expect(read_out).to_contain_text(re.compile(r"95% interval \d+\.\d to \d+\.\d; 20 samples"))
    cell.press("ArrowRight")
    expect(read_out).to_contain_text(f"{TASK}/generation/2048")
    page.go_back()
    expect(heads).to_have_count(9)
    other = tab.context.new_page()
    other.goto(page.url)
    other.wait_for_selector(".board tbody tr")
    expect(names(other)).to_have_text(["linear", "trellis"])  # by the state's bytes: equal, so by name
    assert other.get_by_label("Runs").input_value() == "/^(tre|lin)/"


def test_a_checkpoint_is_the_newest_the_best_or_of_one_step(tab: Tab, service: Service) -> None:
    page = tab.open(service.url("leaderboard?runs=trellis"))
    for query, rows in (
        ("at=all", ["1,000", "2,000"]),
        ("at=step&step=1000", ["1,000"]),
        ("at=best", ["2,000"]),
    ):
        page.goto(service.url(f"leaderboard?runs=trellis&sort=step&dir=up&{query}"))
        expect(page.locator("tr[data-key^=trellis] td:nth-child(2)")).to_have_text(rows)


def test_curves_toggle_runs_axes_and_read_out(tab: Tab, service: Service) -> None:
    page = tab.open(service.url(f"curves?scalar={TASK}/*"))
    page.wait_for_selector(".chart polyline")
    counts(page, ".chart", 2 * len(LENGTHS))  # written, chosen
    expect(page.locator(".chart").first.locator("polyline")).to_have_count(len(QUALITY))
    page.locator(".legend button", has_text="deltanet").click()
    expect(page.locator(".chart").first.locator("polyline")).to_have_count(len(QUALITY) - 1)
    page.get_by_role("button", name="tokens").click()
    page.get_by_label("log x").check()
    assert {"x=tokens", "logx=1", "off=deltanet"} <= set(params(page).partition("?")[2].split("&"))
    plot = page.locator(".plot").first
    plot.focus()
    plot.press("ArrowRight")
    lines = page.locator("#tip").inner_text().splitlines()
    assert lines[0] == "tokens 524.3M"
    assert sum("%" in line for line in lines) == len(QUALITY) - 1 + 2
    peer = page.locator(".legend button", has_text="peer")
    levels = page.locator(".chart").first.locator("svg > line[stroke-dasharray]")
    expect(levels).to_have_count(2)
    expect(page.locator(".chart").first.locator("svg > text", has_text="chance")).to_be_visible()
    assert sum("peer" in line or "chance" in line for line in lines) == 2
    peer.click()
    expect(levels).to_have_count(1)


def test_a_cell_of_the_heat_map_leads_to_its_samples(tab: Tab, service: Service) -> None:
    page = tab.open(service.url(f"heatmap?task={TASK}&first=deltanet@2000"))
    cell = page.locator(".heat td a").nth(5)
    cell.wait_for()
    assert page.locator(".heat thead th").all_inner_texts()[1:] == ["1K", "2K", "4K", "8K"]
    count = re.search(r"of (\d+) samples, length (\d+), depth (\d+)-(\d+)%", cell.get_attribute("aria-label"))
    assert count is not None
    inside, length, low, high = map(int, count.groups())
    cell.click()
    counts(page, ".samples li", 2)
    assert inside == 2
    facts = page.locator(".facts").inner_text()
    assert f"group {length}" in facts
    depth = re.search(r"depth ([\d.]+)%", facts)
    assert depth is not None
    assert low <= float(depth[1]) < high
    assert sum("depth_from" in request for request in tab.requests) == 1, "the service finds them"
    page.get_by_label(f"all depths instead of {low}-{high}%").click()
    counts(page, ".samples li", 20)


def test_a_baseline_is_compared_and_read_as_a_run_is(tab: Tab, service: Service) -> None:
    page = tab.open(service.url("leaderboard?tasks=piqa"))
    for name in ("peer@-", "linear@2000"):
        page.get_by_label(f"tick {name}").check()
    page.get_by_role("link", name="Compare", exact=True).last.click()
    page.wait_for_selector(".forest tbody tr")
    assert {"first=peer@-", "second=linear@2000"} <= set(params(page).partition("?")[2].split("&"))
    page.get_by_role("button", name="Swap").click()
    page.wait_for_url("**second=peer%40-**")
    expect(page.locator(".forest tbody tr")).to_have_count(1)
    page.goto(service.url("leaderboard?tasks=piqa"))
    page.locator("tr[data-key='peer@-'] td[data-column='0']").click()
    expect(page.locator(".samples li").first).to_be_visible()
    expect(page.locator("section:visible .note").first).to_contain_text("piqa, peer: samples 1 to 50 of 80")
    page.goto(service.url(f"heatmap?task={TASK}&first=peer@-&second=linear@1000"))
    expect(page.locator("figure:visible > figcaption")).to_have_text(["peer", "linear, step 1,000"])


def test_a_copied_run_is_a_row_of_its_own(tab: Tab, service: Service) -> None:
    key = digest(["linear", 2000, "piqa"])
    tab.page.clock.install()
    page = tab.open(service.url("leaderboard?tasks=piqa&runs=linear"))
    expect(names(page)).to_have_text(["linear"])
    place = Place(run="linear-copy", step=2000, task="piqa", key=key, digest="d")
    service.queue.note(place)
    try:
        page.clock.fast_forward(5000)
        expect(names(page)).to_have_text(["linear", "linear-copy"])
        page.locator("tr[data-key='linear-copy@2000'] td[data-column='0']").click()
        expect(page.locator("section:visible .note").first).to_contain_text("piqa, linear-copy, step 2,000")
    finally:
        service.queue.forget([place])
    page.clock.fast_forward(5000)
    page.goto(service.url("leaderboard?tasks=piqa&runs=linear"))
    expect(names(page)).to_have_text(["linear"])


def test_samples_are_read_with_j_and_k_filtered_and_searched(tab: Tab, service: Service) -> None:
    page = tab.open(service.url("samples?task=piqa&checkpoint=linear@2000"))
    page.wait_for_selector(".samples li")
    chosen = page.locator(".samples li[aria-selected=true] .place")
    for key, place in (("j", "2"), ("j", "3"), ("k", "2")):
        page.keyboard.press(key)
        expect(chosen).to_have_text(place)
    page.goto(service.url("samples?task=piqa&checkpoint=linear@2000&at=49"))
    expect(chosen).to_have_text("50")
    page.keyboard.press("j")  # of the next page
    expect(chosen).to_have_text("51")
    page.get_by_label("wrong").check()
    counts(page, ".samples .mark.right", 0)
    expect(page.locator(".samples .mark.wrong").first).to_be_visible()
    page.get_by_label("Search").fill("Question 7:")
    page.get_by_label("wrong").uncheck()
    counts(page, ".samples li", 1)
    expect(page.locator(".sample pre").last).to_contain_text("Question 7:")
    counts(page, ".sample .details", 1)


def test_two_checkpoints_are_compared(tab: Tab, service: Service) -> None:
    page = tab.open(service.url(f"compare?task={TASK}&first=linear@2000&second=trellis@2000"))
    page.wait_for_selector(".forest tbody tr")
    first, second = (digest([run, 2000, TASK]) for run in ("linear", "trellis"))
    one, other = Results(service.queue.database).pairs(first, second)["4096"]
    expected = compare(one, other)
    row = page.locator(".forest tbody tr", has_text="4K")
    cells = [text.replace("\u2212", "-") for text in row.locator("td").all_inner_texts()]
    assert cells[0] == f"{expected['first']:.1f}"
    assert cells[2] == f"{expected['difference']:+.1f}"
    assert cells[4] == f"{expected['low']:+.1f} to {expected['high']:+.1f}"
    row.get_by_role("button").click()
    page.wait_for_selector(".differing details")
    counts(page, ".differing details", int((one != other).sum()))
    page.locator(".differing summary").first.click()
    expect(page.locator(".differing details").first.locator("pre")).to_have_count(3)
    page.get_by_role("button", name="Swap").click()
    page.wait_for_selector(".forest tr.worse")
    swapped = page.locator(".forest tbody tr", has_text="4K").locator("td").all_inner_texts()[2]
    assert swapped.replace("\u2212", "-") == f"{-expected['difference']:+.1f}"


def test_the_queue_cancels_and_submits_after_a_question(tab: Tab, service: Service) -> None:
    page = tab.open(service.url("queue"))
    page.wait_for_selector(".queue tbody tr")
    expect(page.locator(".queue tbody tr").first).to_contain_text("running")
    key = digest(["trellis", 2000, "lambada"])
    cancel = page.locator(f"tr[data-key='{key}'] button")
    cancel.click()
    page.get_by_role("button", name="Back").click()
    assert service.queue.job(key).state == "queued"
    cancel.click()
    page.get_by_role("button", name="Cancel the job").click()
    page.wait_for_selector(f"tr[data-key='{key}'] .cancelled")
    assert service.queue.job(key).state == "cancelled"
    page.get_by_role("button", name="Submit ...").click()
    page.locator("dialog[open]").get_by_label("sample", exact=True).check()
    page.get_by_role("button", name="Queue 1 on tiny, newest step").click()
    page.get_by_text("1 queued.").wait_for()
    page.locator(".queue tbody tr", has_text="tiny").wait_for()
    [job] = service.queue.jobs(run="tiny")[0]
    assert (job.task, job.step, job.state) == ("sample", 7, "queued")
    page.get_by_role("button", name="failed").click()
    counts(page, ".queue tbody tr", 1)
    expect(page.locator(".queue tbody tr")).to_contain_text("harness")


def test_submitting_names_new_runs_and_goes_on_after_a_refusal(
    tab: Tab, service: Service, folder: Path
) -> None:
    page = tab.open(service.url("queue"))
    page.wait_for_selector(".queue tbody tr")
    shutil.copytree(folder / "runs" / "tiny", folder / "runs" / "younger")
    try:
        page.get_by_role("button", name="Submit ...").click()
        dialog = page.locator("dialog[open]")
        dialog.get_by_label("Run").select_option("younger")
        for task in ("niah_single_2", "sample"):  # the first needs prose that the recipe does not name
            dialog.get_by_label(task, exact=True).check()
        page.get_by_role("button", name="Queue 2 on younger").click()
        page.get_by_text("niah_single_2: run younger cannot be scored").wait_for()
        asked = [job.task for job in service.queue.jobs(run="younger")[0]]
        same = [job.task for job in service.queue.jobs(run="tiny")[0]]
        assert "sample" in asked + same  # one result per checkpoint, whatever its run is called
        assert "404" in tab.complaints.pop()  # the browser's own line about the refusal
    finally:
        shutil.rmtree(folder / "runs" / "younger")


def test_what_the_server_sends_is_text(tab: Tab, service: Service) -> None:
    page = tab.open(service.url("leaderboard"))
    page.get_by_role("link", name=BAD, exact=True).wait_for()
    for route, selector in (
        (f"samples?task={TASK}&checkpoint=linear@1000&search=%3Cscript", ".sample pre"),
        ("queue?state=failed", ".queue .error"),
        ("curves", ".legend"),
        (f"compare?task={TASK}&first=linear@1000&second=trellis@1000&group={HOSTILE}", ".differing h2"),
    ):
        page.goto(service.url(route))
        page.locator(selector, has_text=HOSTILE).first.wait_for()
    assert page.locator("script").count() == 1


def test_the_page_recovers_from_a_restart(browser: Any, service: Service, folder: Path) -> None:
    tab = Tab(browser)
    tab.page.clock.install()
    page = tab.open(service.url("leaderboard?runs=trellis&at=all&sort=run"))
    page.wait_for_selector(".board tbody tr")
    page.evaluate("document.querySelector('.tall').scrollLeft = 120")
    page.wait_for_load_state("networkidle")
    service.stop()
    page.clock.fast_forward(5000)  # past the next poll
    page.wait_for_selector("#status[data-state=down]")
    assert "no answer" in page.locator("#status").inner_text()
    expect(names(page)).to_have_count(2)
    key = digest(["trellis", 3000, "piqa"])
    service.queue.submit(key, run="trellis", step=3000, task="piqa")
    service.queue.finish(key, {"seconds": 1.0, "result": {"groups": {}}, "scalars": {"piqa/acc": 61.5}})
    service.start()
    page.clock.fast_forward(5000)
    page.wait_for_selector("#status[data-state=live]")
    page.wait_for_selector("tr[data-key='trellis@3000']")
    assert page.evaluate("document.querySelector('.tall').scrollLeft") == 120
    assert page.get_by_label("Runs").input_value() == "trellis"
    tab.context.close()
    # A browser reports every request that fails; nothing else was complained about.
    assert [text for text in tab.complaints if "ERR_CONNECTION" not in text] == []


def test_a_hidden_page_asks_for_nothing(tab: Tab, service: Service) -> None:
    tab.page.clock.install()
    page = tab.open(service.url("queue"))
    page.wait_for_selector(".queue tbody tr")

    def show(hidden: bool) -> None:
        page.evaluate(
            "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )

    page.wait_for_load_state("networkidle")
    show(hidden=True)
    before = len(tab.requests)
    page.clock.run_for(60_000)
    assert len(tab.requests) == before
    with page.expect_response("**/health"):
        show(hidden=False)


def test_a_token_is_asked_for_and_never_in_an_address(browser: Any, folder: Path) -> None:
    service, tab = Service(folder, token="right"), Tab(browser)
    try:
        page = tab.page
        page.goto(service.url("leaderboard"))
        for token in ("wrong", "right"):
            page.get_by_role("textbox", name="Token").fill(token)
            page.get_by_role("button", name="Use it").click()
            if token == "wrong":
                page.get_by_text("That token was refused.").wait_for()
        page.wait_for_selector(".board tbody tr")
        page.reload()
        page.wait_for_selector(".board tbody tr")  # kept for as long as the tab is open
        assert not any("right" in request or "wrong" in request for request in tab.requests)
        assert [text for text in tab.complaints if "401" not in text] == []
    finally:
        tab.context.close()
        service.stop()


@pytest.mark.parametrize("width,dark", [(500, True), (1440, False)])
def test_every_view_fits_and_is_labelled(browser: Any, service: Service, width: int, dark: bool) -> None:
    tab = Tab(browser, width=width, dark=dark)
    page = tab.open(service.url("leaderboard"))
    for view in VIEWS:
        page.goto(service.url(view))
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        assert page.evaluate(NAMELESS) == [], view
        assert page.locator("main section:visible").get_attribute("aria-label")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'") != dark
    tab.context.close()
    assert tab.complaints == []


# Controls that can be seen and have no name, and tables without a heading.
NAMELESS = """() => {
  const shown = (e) => e.checkVisibility();
  const labels = (e) => [...e.labels].map((label) => label.textContent).join();
  const written = (e) => (e.matches('button, a') ? e.textContent : labels(e));
  const named = (e) => (e.getAttribute('aria-label') ?? written(e)).trim();
  const all = (selector) => [...document.querySelectorAll(selector)].filter(shown);
  const controls = all('input, select, button, a').filter((e) => !named(e));
  const tables = all('main table').filter((e) => !e.querySelector('th'));
  return [...controls, ...tables].map((e) => e.outerHTML.slice(0, 80));
}"""


def test_nothing_moves_while_the_page_is_left_open(tab: Tab, service: Service) -> None:
    tab.page.add_init_script(
        "window.moved = 0;"
        "new PerformanceObserver((list) => { for (const e of list.getEntries()) moved += e.value; })"
        ".observe({ type: 'layout-shift', buffered: true });"
    )
    page = tab.open(service.url("queue"))
    page.wait_for_selector(".queue tbody tr")
    page.wait_for_load_state("networkidle")
    page.evaluate("moved = 0")
    for _ in range(3):
        with page.expect_response("**/jobs?*"):
            page.evaluate("window.dispatchEvent(new Event('evaluations:refresh'))")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("moved") == 0


def test_rows_are_drawn_as_they_are_scrolled_to(tab: Tab, service: Service) -> None:
    page = tab.page
    rows = [
        {"key": f"k{i}", "run": f"run-{i}", "step": 1, "tokens": None, "task": "piqa", "groups": {}}
        | {"scalars": {"piqa/acc": i / 10}, "seconds": 1.0, "created": float(i)}
        for i in range(200)
    ]
    page.route("**/results?*", lambda route: route.fulfill(json={"results": rows, "total": len(rows)}))
    tab.open(service.url("leaderboard"))
    page.wait_for_selector(".board tbody tr")
    assert 0 < page.locator(".board tbody tr").count() < 200
    expect(page.locator(".note").first).to_contain_text("200 checkpoints of 200 runs")
    scroll = "document.querySelector('.tall').scrollTop = 1e6"
    while page.locator(".board tbody tr").count() < 200:
        before = page.locator(".board tbody tr").count()
        page.evaluate(scroll)
        page.wait_for_selector(f".board tbody tr:nth-child({before + 1})")
    expect(names(page).last).to_have_text("run-0")


def test_what_is_known_about_names(tab: Tab, service: Service) -> None:
    page = tab.open(service.url("queue"))
    lower = page.evaluate(
        "import('/assets/scalars.js').then((m) => ['eval/bits_per_byte', 'decode/ms_per_token',"
        " 'decode/state_bytes', 'lambada/perplexity', 'lambada/ppl', 'eval/loss', 'piqa/acc',"
        " 'niah_single_1/4096', 'x/terms', 'harness/x/word_perplexity,none',"
        " 'context_length/512'].map(m.lowerIsBetter))"
    )
    assert lower == [True] * 6 + [False] * 3 + [True] * 2
    values = page.evaluate(
        "import('/assets/dom.js').then((m) => [m.matcher('A')('xa'), m.matcher('/^a$/')('ab'),"
        " m.matcher('/(/'), m.matcher('a.c')('abc'), m.age(59), m.age(3600), m.signed(-0.04),"
        " m.compact(2621440000)])"
    )
    assert values == [True, False, None, False, "59 s", "1 h", "0.0", "2.621B"]
