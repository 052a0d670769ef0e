"""The page of a recorded run in a real browser shows what the records say.

Needs Chromium or Chrome, and playwright (`pip install -e '.[browser]'`). Set PAGE_SHOTS to a folder
to keep the screenshots.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traced_run import (
    BLOCK_SIZE,
    HOSTILE,
    NUM_BLOCKS,
    block_kinds,
    block_tables,
    frames,
    pieces,
    texts,
    traced_records,
)

from nanovllm.trace.page import Run, write_runs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

# What the page shows after `show(i)`, for every frame i.
READ = """() => {
  const labels = (selector) => [...document.querySelectorAll(selector)].map((e) => Number(e.dataset.seq));
  const found = [];
  for (let i = 0; i < view.run.steps.length; i += 1) {
    show(i);
    const panels = [...document.querySelectorAll(".sequence")];
    const blocks = [...document.querySelectorAll(".block")];
    found.push({
      running: labels("[data-queue=running] .chip"),
      waiting: labels("[data-queue=waiting] .chip, [data-queue=preempted] .chip"),
      preempted: labels("[data-queue=preempted] .chip"),
      budget: [...document.querySelectorAll(".bar-row:not(.close) .segment[data-seq]")].map(
        (e) => [Number(e.dataset.seq), Number(e.dataset.count)]),
      counts: document.getElementById("cache-counts").innerText,
      refs: blocks.map((e) => Number(e.dataset.refs)),
      kinds: blocks.map((e) => e.dataset.kind),
      named: blocks.map((e) => e.classList.contains("named")),
      tables: panels.map((e) => [...e.querySelectorAll(".mini button")].map((b) => Number(b.dataset.block))),
      texts: panels.map((e) => [...e.querySelectorAll(".answer:not(.newest)")].map((t) => t.textContent).join("")),
      newest: panels.map((e) => e.querySelector(".newest")?.textContent ?? null),
    });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "run.html"
    write_runs([Run(traced_records(), "First"), Run(traced_records(), "Second")], path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


class Window:
    """A window with the page, and what its console said."""

    def __init__(self, browser: Any, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 800}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self.note_request)

    def note_request(self, request: Any) -> None:
        if not request.url.startswith("file:"):
            self.complaints.append(request.url)

    @property
    def step(self) -> int:
        return int(self.page.locator("body").get_attribute("data-step"))

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_selector("body[data-step]")

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.dataset.block ?? ''"))


@pytest.fixture(scope="module")
def shared_window(browser: Any, address: str) -> Window:
    window = Window(browser)
    window.open(address)
    return window


@pytest.fixture
def window(shared_window: Window) -> Iterator[Window]:
    """At the first step, nothing open. Fails if the console said anything."""
    shared_window.page.evaluate("chooseRun(0)")
    shared_window.page.evaluate("closeTerm(); document.activeElement.blur(); scrollTo(0, 0)")
    yield shared_window
    assert shared_window.complaints == []


@pytest.fixture(scope="module")
def shown(shared_window: Window) -> list[dict[str, Any]]:
    """What the page shows at each frame."""
    return list(shared_window.page.evaluate(READ))


def test_every_step_shows_what_the_records_say(shown: list[dict[str, Any]]) -> None:
    records = traced_records()
    assert len(shown) == len(frames(records))
    lost: set[int] = set()
    for frame, kinds, tables, found in zip(
        frames(records), block_kinds(records), block_tables(records), shown
    ):
        lost |= set(frame["preempted"])
        assert found["running"] == frame["running"]
        assert sorted(found["waiting"]) == sorted(frame["waiting"])
        assert found["preempted"] == [seq for seq in frame["waiting"] if seq in lost]
        assert found["budget"] == [[run["seq"], run["count"]] for run in frame.get("seqs", [])]
        used = NUM_BLOCKS - frame["free"]
        cached = sum(1 for refs, registered in kinds.values() if registered and not refs)
        empty = NUM_BLOCKS - used - cached
        counts = f"{used} of {NUM_BLOCKS} blocks held, {cached} cached, {empty} empty"
        assert found["counts"] == counts
        states = [kinds.get(block, (0, False)) for block in range(NUM_BLOCKS)]
        assert found["refs"] == [refs for refs, _ in states]
        assert found["named"] == [registered for _, registered in states]
        assert found["kinds"] == [kind(*state) for state in states]
        assert found["tables"] == [tables.get(seq, []) for seq in range(len(found["tables"]))]


def kind(refs: int, registered: bool) -> str:
    if refs == 0:
        return "cached" if registered else "empty"
    return "shared" if refs > 1 else "held"


def test_texts_grow_token_by_token(shown: list[dict[str, Any]]) -> None:
    records = traced_records()
    after = texts(records)
    for index, (frame, found) in enumerate(zip(frames(records), shown)):
        before = after[index - 1] if index else dict.fromkeys(after[0], "")
        sampled = {token["seq"]: token for token in frame.get("tokens", [])}
        for seq, newest in enumerate(found["newest"]):
            if seq not in sampled:
                assert newest is None
                continue
            token = sampled[seq]
            piece = token.get("piece", token["text"])
            visible = piece.replace("\n", "↵").replace("\t", "⇥")
            assert newest == (visible or f"⟨{token['id']}⟩")
            assert found["texts"][seq] == before[seq]


@pytest.mark.parametrize("total", [0, 119, 121, 500, 8192])
def test_long_texts_show_their_beginning_and_what_the_step_computes(
    window: Window, total: int
) -> None:
    for computed in (0, total // 3, total):
        ranges = window.page.evaluate(f"shownRanges({total}, {computed}, 120)")
        positions = [position for start, end in ranges for position in range(start, end)]
        assert positions == sorted(set(positions))
        assert len(positions) == min(total, 120)
        assert set(positions) <= set(range(total))
        if total:
            assert {0, max(computed - 1, 0), min(computed, total - 1)} <= set(positions)


def test_a_cut_text_counts_what_it_leaves_out(window: Window) -> None:
    page = window.page
    page.evaluate("openBlock(null)")
    text = """most => {
      const sequence = [...view.run.sequences.values()][0];
      const own = {computed: 0, hit: 0, reason: null};
      const text = sequenceText(sequence, own, "waiting", 0, most);
      const left = [...text.querySelectorAll(".none")].map((e) => Number(e.textContent.match(/\\d+/)));
      return [text.querySelectorAll(".token").length, left, sequence.promptLength];
    }"""
    shown, left, total = page.evaluate(text, 8)
    assert shown == 8
    assert sum(left) == total - 8
    shown, left, total = page.evaluate(text, 10_000)
    assert (shown, left) == (total, [])


def test_the_run_has_all_that_the_page_can_show() -> None:
    """Otherwise the tests here would test less than they say."""
    steps = frames(traced_records())
    events = [event["event"] for step in steps for event in step["blocks"]]
    assert {"acquire", "allocate", "register", "evict", "release", "free"} <= set(events)
    assert any(step["preempted"] for step in steps)
    assert any(event["refs"] > 1 for step in steps for event in step["blocks"])
    runs = [step.get("seqs", []) for step in steps]
    assert any(not run["samples"] for step in runs for run in step)
    assert any({run["kind"] for run in step} == {"prefill", "decode"} for step in runs)


def test_the_slider_shows_the_step_under_it(window: Window) -> None:
    last = len(frames(traced_records())) - 1
    slider = window.page.locator("#scrub")
    for step in (last, 3, last // 2):
        slider.fill(str(step))
        assert window.step == step
    number = frames(traced_records())[last // 2]["number"]
    assert window.page.inner_text("#where").startswith(f"Step {number} of ")


def test_a_press_on_the_chart_shows_the_step_under_the_pointer(window: Window) -> None:
    count = len(frames(traced_records()))
    box = window.page.locator("#chart .base").first.bounding_box()
    for step in (7, count - 1, 0):
        x = box["x"] + box["width"] * (step + 0.5) / count
        window.page.mouse.click(x, box["y"] - 4)
        assert window.step == step


def test_it_plays_to_the_end_and_pauses(window: Window) -> None:
    page = window.page
    last = len(frames(traced_records())) - 1
    page.select_option("#speed", "40")
    page.evaluate(f"show({last - 4})")
    page.click("#play")
    assert page.get_attribute("#play", "aria-label") == "Pause"
    page.locator(f"body:not(.playing)[data-step='{last}']").wait_for()
    assert page.get_attribute("#play", "aria-label") == "Play"
    page.select_option("#speed", "1")
    page.click("#play")  # from the end it begins again
    page.click("#play")
    stopped = window.step
    assert stopped < last
    assert page.evaluate("view.timer") is None
    page.click("#forward")
    assert window.step == stopped + 1


def test_the_keyboard_does_everything(window: Window) -> None:
    page = window.page
    last = len(frames(traced_records())) - 1
    presses = [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("Shift+ArrowRight", 12),
        ("ArrowLeft", 11),
        ("End", last),
        ("ArrowRight", last),
        ("Home", 0),
        ("ArrowLeft", 0),
    ]
    for key, step in presses:
        page.keyboard.press(key)
        assert window.step == step, key
    page.keyboard.press("Space")
    assert page.evaluate("view.timer") is not None
    page.keyboard.press("Space")
    assert page.evaluate("view.timer") is None


def test_the_keyboard_opens_a_block(window: Window) -> None:
    page = window.page
    page.locator("#cache .term").first.focus()
    page.keyboard.press("Tab")  # past the count's term
    page.keyboard.press("Tab")
    assert window.focused() == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert window.focused() == "1"
    assert window.step == 0
    page.keyboard.press("Enter")
    assert page.inner_text("#detail-title") == "Block 1"
    page.keyboard.press("Escape")
    assert page.inner_text("#detail-title") == "One block"


def test_a_click_on_a_block_shows_its_tokens_chain_and_history(window: Window) -> None:
    records = traced_records()
    page = window.page
    index, block, seq, place = chained_block(records)
    page.evaluate(f"show({index})")
    page.click(f".block[data-block='{block}']")
    assert page.inner_text("#detail-title") == f"Block {block}"

    start = place * BLOCK_SIZE
    expected = [p.replace("\n", "↵").replace("\t", "⇥") for p in pieces(records, seq)]
    shown = page.locator("#detail-tokens .token").all_text_contents()
    assert shown == expected[start : start + BLOCK_SIZE]

    chain = block_tables(records)[index][seq][: place + 1]
    assert page.locator("#detail-chain button").all_text_contents() == list(map(str, chain))
    hashes = [
        event["hash"]
        for frame in frames(records)[: index + 1]
        for event in frame["blocks"]
        if event["event"] == "register" and event["block"] == block
    ]
    assert page.locator("#detail-chain code").last.get_attribute("title") == hashes[-1]

    events = [
        (i, event["event"], event["refs"])
        for i, frame in enumerate(frames(records))
        for event in frame["blocks"]
        if event["block"] == block
    ]
    items = page.locator("#detail-history li").all_text_contents()
    assert [int(item.split("→")[1]) for item in items] == [refs for _, _, refs in events]
    steps = page.locator("#detail-history .to-step")
    assert [int(at) for at in steps.evaluate_all("all => all.map((e) => e.dataset.step)")] == [
        i for i, _, _ in events
    ]
    steps.last.click()
    assert window.step == events[-1][0]


def chained_block(records: list[dict[str, Any]]) -> tuple[int, int, int, int]:
    """(frame, block, sequence, its place in the table) of a registered third block."""
    for index, (kinds, tables) in enumerate(zip(block_kinds(records), block_tables(records))):
        for seq, table in tables.items():
            if len(table) > 3 and all(kinds[block][1] for block in table[:3]):
                return index, table[2], seq, 2
    raise AssertionError("no sequence has three registered blocks")


def test_a_term_explains_itself_and_links_to_its_line(window: Window) -> None:
    page = window.page
    term = page.locator("#budget .term[data-term=budget]")
    term.focus()
    page.keyboard.press("Enter")
    assert "largest number of tokens" in page.inner_text("#popover")
    link = page.evaluate("[document.activeElement.textContent, document.activeElement.href]")
    assert link[0].startswith("nanovllm/engine/scheduler.py:")
    path, line = link[1].removeprefix("file://").split("#L")
    text = Path(path).read_text().splitlines()[int(line) - 1]
    assert text.strip().startswith("budget = self.max_num_batched_tokens")
    page.keyboard.press("Escape")
    assert page.is_hidden("#popover")
    assert page.evaluate("document.activeElement.dataset.term") == "budget"
    term.click()
    assert page.is_visible("#popover")
    page.mouse.click(5, 5)
    assert page.is_hidden("#popover")


def test_a_token_tells_its_logprob_under_the_pointer(window: Window) -> None:
    page = window.page
    page.evaluate("show(4)")
    token = next(t for t in frames(traced_records())[4]["tokens"])
    page.hover(f"#seq-{token['seq']} .newest")
    tip = page.inner_text("#tip")
    assert f"token {token['id']}" in tip
    assert f"logprob {token['logprob']:.3f}" in tip
    assert page.locator("#tip li").count() == len(token["top"])


def test_the_tour_stops_where_the_records_say(window: Window) -> None:
    page = window.page
    steps = frames(traced_records())
    page.keyboard.press("t")
    stops = page.evaluate("view.tour.map(({key, step}) => [key, step])")
    found = dict(stops)
    assert [step for _, step in stops] == sorted(step for _, step in stops)
    first = {
        "start": 0,
        "preemption": next(i for i, s in enumerate(steps) if s["preempted"]),
        "hit": next(i for i, s in enumerate(steps) if any(a["hit"] for a in s["admitted"])),
        "eviction": next(
            i for i, s in enumerate(steps) if any(e["event"] == "evict" for e in s["blocks"])
        ),
        "mixed": next(
            i
            for i, s in enumerate(steps)
            if {run["kind"] for run in s["seqs"]} == {"prefill", "decode"}
        ),
        "chunk": next(i for i, s in enumerate(steps) if any(not r["samples"] for r in s["seqs"])),
        "token": next(i for i, s in enumerate(steps) if s["tokens"]),
        "end": len(steps) - 1,
    }
    assert {key: found[key] for key in first} == first
    assert page.evaluate("STOPS.map((stop) => stop.key).sort()") == sorted(found)


def test_the_tour_leads_from_stop_to_stop(window: Window) -> None:
    page = window.page
    page.click("#tour-button")
    count = page.evaluate("view.tour.length")
    for number in range(count):
        stop = page.evaluate(f"view.tour[{number}]")
        assert window.step == stop["step"]
        assert page.locator(".spot").count() == 1
        assert page.evaluate("document.querySelector('.spot').matches(view.tour[view.stop].target)")
        box = page.locator(".spot").bounding_box()
        assert box["y"] < 800
        assert box["y"] + box["height"] > 0
        text = page.inner_text("#tour-text p")
        assert 2 <= text.count(". ") + text.endswith(".") <= 4
        assert "[[" not in text
        assert "undefined" not in text
        assert "NaN" not in text
        page.click("#tour-next", force=number == count - 1)
    page.click("#tour-back")
    assert page.inner_text("#tour-place") == f"{count - 1} of {count}"
    page.keyboard.press("Escape")
    assert page.is_hidden("#tour")
    assert page.locator(".spot").count() == 0


def test_runs_can_be_chosen_and_the_address_remembers(browser: Any, address: str) -> None:
    window = Window(browser)
    window.open(f"{address}#run=1&step=5&block=2")
    assert window.step == 5
    assert window.page.inner_text("#title") == "Second"
    assert window.page.inner_text("#detail-title") == "Block 2"
    window.page.click("#runs button >> nth=0")
    assert window.page.inner_text("#title") == "First"
    window.page.keyboard.press("ArrowRight")
    window.page.wait_for_url("**#run=0&step=1")
    assert window.complaints == []
    window.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_it_fits_and_can_be_read(
    browser: Any, address: str, tmp_path: Path, width: int, scheme: str
) -> None:
    window = Window(browser, width, scheme)
    page = window.page
    window.open(f"{address}#run=0&step=12&block=2")
    page.wait_for_selector(".block")
    assert page.evaluate("window.hurt") is None
    assert HOSTILE[:20] in page.inner_text("#sequences")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    folder = Path(os.environ.get("PAGE_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"page-{width}-{scheme}.png", full_page=True)
    page.click("#tour-button")
    page.click("#tour-next")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=folder / f"tour-{width}-{scheme}.png")
    assert page.evaluate(CONTRAST) == []
    assert window.complaints == []
    page.close()


# Texts whose contrast to the colour behind them is below 4.5, the limit of WCAG 2.2 (1.4.3).
# Texts over pictures and half transparent texts are left out.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.backgroundImage !== "none" || Number(style.opacity) < 1) return null;
      const colour = rgb(style.backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgb("white");
  };
  const bad = new Set();
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!hasText || !element.checkVisibility() || element.closest("svg, script, :disabled")) continue;
    const back = behind(element);
    if (!back) continue;
    const [a, b] = [luminance(rgb(getComputedStyle(element).color)), luminance(back)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) bad.add(`${element.tagName}.${element.className} ${contrast.toFixed(2)}`);
  }
  return [...bad];
}"""
