"""The page: hostile names stay text, nothing is fetched, the same bytes twice; in a browser it does what it says."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

import analysis.page.data
from analysis.load import load_runs
from analysis.page import PageTable, page
from analysis.select import best_cells, cells
from analysis.tables import choices
from harness.results.schema import RunResult, Status, write_result

SCRIPT = "</script><script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(1)>'
LINK = '<a href="javascript:alert(1)">link</a> <b>bold</b> &lt;'
HALF_PAIR = "\ud800"
PIXEL = b"\x89PNG\r\n\x1a\n pixel"
PLACEMENTS = ("qv", "all")


# ---------------------------------------------------------------- runs


def save(runs_dir: Path, method: str, seed: int, rate: float, **options: Any) -> None:
    """A run whose numbers follow from its settings."""
    rank, placement = options.get("rank"), options.get("placement")
    cell_id = "-".join(map(str, (method, rank, placement, rate))).replace("/", "_")
    status = options.get("status", Status.FINISHED)
    adapter = (rank or 0) * (1000 if placement == "qv" else 5000)
    accuracy = 0.8 + 0.01 * math.log2((rank or 1) + 1) + 0.002 * seed - abs(rate - 0.001)
    metrics = {
        "num_adapter_params": adapter,
        "num_trainable_params": adapter + 100,
        "num_total_params": 100_000,
        "peak_memory_bytes": 2**27 + 2**22 * (rank or 40) * (1 + seed / 100),
        "weights_bytes": 2**26,
        "activations_bytes": 2**25,
        "val_accuracy": accuracy,
        "test_accuracy": accuracy - 0.01,
        "step_seconds_median": 0.1234,
    }
    if "flops" in options:
        metrics["train_flops"] = options["flops"]
    result = RunResult(
        run_id=f"{cell_id}-s{seed}",
        cell_id=cell_id,
        sweep="demo",
        status=status,
        config={
            "model": {"name": options.get("model", "bert")},
            "dataset": {"name": "sst2", "best_metric": "accuracy"},
            "method": {"name": method},
            "rank": None if rank is None else {"rank": rank, "alpha": 16.0},
            "target_layers": None if placement is None else {"name": placement, "blocks": "all"},
            "trainer": {"learning_rate": rate, "note": options.get("note")},
            "seed": seed,
        },
        metrics=metrics if status is Status.FINISHED else {},
        environment={"device_type": "cpu"},
        error=options.get("error", ""),
    )
    write_result(runs_dir / result.run_id, result)


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    """Two placements by three ranks, full and head only, two seeds, one condition at two rates, one failed run."""
    for seed in (0, 1):
        save(tmp_path, "full", seed, 0.001)
        save(tmp_path, "head_only", seed, 0.001)
        save(tmp_path, "lora", seed, 0.01, rank=4, placement="qv")
        for placement in PLACEMENTS:
            for rank in (1, 4, 16):
                save(tmp_path, "lora", seed, 0.001, rank=rank, placement=placement)
    save(tmp_path, "lora", 0, 0.001, rank=64, placement="qv", status=Status.FAILED, error=f"ValueError: {SCRIPT}")
    return load_runs(tmp_path).frame


@pytest.fixture
def hostile(tmp_path: Path) -> pd.DataFrame:
    save(tmp_path, f"lora{IMAGE}", 0, 0.001, rank=4, placement=SCRIPT, model="<b>&amp;\u2028", note=SCRIPT)
    save(tmp_path, f"lora{IMAGE}", 0, 0.01, rank=8, placement=f"{LINK} %{{x}} $x$", model="<b>&amp;\u2028", note=IMAGE)
    save(tmp_path, "full", 0, 0.001, status=Status.FAILED, error=SCRIPT + IMAGE + HALF_PAIR)
    return load_runs(tmp_path).frame


def table(frame: pd.DataFrame) -> PageTable:
    """A row per cell: method, rank, peak memory."""
    rows = ""
    for cell in cells(frame).to_dict("records"):
        memory = cell["peak_memory_bytes"]
        memory_field = "<td>–</td>" if math.isnan(memory) else f'<td data-value="{memory}">{memory / 2**20:.1f}</td>'  # noqa: RUF001
        rank_field = "<td>–</td>" if cell["rank"] is None else f'<td data-value="{cell["rank"]}">{cell["rank"]}</td>'  # noqa: RUF001
        rows += (
            f'<tr data-run-ids="{escape(" ".join(cell["run_ids"]))}" data-method="{escape(cell["method"])}">'
            f"<td>{escape(cell['method'])}</td>{rank_field}{memory_field}</tr>"
        )
    head = "<thead><tr><th>method</th><th>rank</th><th>peak memory</th></tr></thead>"
    return PageTable("Cost", "Every `cell`.", f"<table>{head}<tbody>{rows}</tbody></table>", ["A note with `code`."])


def make(frame: pd.DataFrame, **options: Any) -> str:
    records = [{"step": step, "train_nll": 2 / step, "val_accuracy": 0.5} for step in range(1, 301)]
    records[3]["train_nll"] = math.nan
    return page(
        title=options.get("title", "demo"),
        summary=["Command: `python -m harness -m sweeps=demo`"],
        tables=options["tables"] if "tables" in options else [table(frame)],
        cells=cells(frame),
        frame=frame,
        curves=options.get("curves", dict.fromkeys(frame["run_id"], records)),
        environment=["device_type: `cpu`"],
        failures=options.get("failures", ["`lora64-s0`: failed"]),
        figures=[("score", "Score", PIXEL)],
        choices=choices(best_cells(cells(frame))),
    )


def data_of(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the JSON")

    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1], parse_constant=refuse)


class Tags(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


# ---------------------------------------------------------------- the text


def test_hostile_text_makes_no_element(frame: pd.DataFrame, hostile: pd.DataFrame) -> None:
    text = make(
        hostile,
        title=SCRIPT,
        tables=[PageTable(IMAGE, SCRIPT, "<table></table>", [f"`{IMAGE}` {SCRIPT}"])],
        failures=[f"`{SCRIPT}` {IMAGE} {HALF_PAIR}"],
    )
    text.encode("utf-8")
    tags = Tags(text.replace(get_plotlyjs(), ""))
    assert len(tags.named("script")) == 3
    assert [image["alt"] for image in tags.named("img")] == ["Score"]
    assert not [attributes for _, attributes in tags.found if any(name.startswith("on") for name in attributes)]
    assert f"<code>{escape(IMAGE)}</code> {escape(SCRIPT)}" in text
    assert escape(SCRIPT) in text[text.index("<title>") :]


def test_hostile_text_survives_in_the_data(hostile: pd.DataFrame) -> None:
    text = make(hostile)
    raw = text[text.index('id="data">') + 10 :].split("</script>")[0]
    assert not re.search("[<>&\u2028\u2029]", raw)
    data = data_of(text)
    assert f"lora{IMAGE}, {SCRIPT}" in data["series"]
    assert {run["error"] for run in data["runs"].values()} == {
        "",
        SCRIPT + IMAGE + "\\ud800",
    }  # half a pair is its code once it is loaded


def test_a_list_in_a_note_is_a_list(frame: pd.DataFrame) -> None:
    table = PageTable("t", "c", "<table></table>", ["two:\n  - `a`\n  - <b>"])
    text = page(
        title="t", summary=[], tables=[table], cells=cells(frame), frame=frame, curves={}, environment=[],
        failures=[],
    )  # fmt: skip
    assert "<li>two:<ul><li><code>a</code></li><li>&lt;b&gt;</li></ul></li>" in text


def test_the_head_says_what_is_best_and_figures_come_before_tables(frame: pd.DataFrame) -> None:
    text = make(frame)
    (choice,) = choices(best_cells(cells(frame)))
    assert choice.verdict.startswith("bert on sst2: `lora rank 16 all` has")
    head = text[text.index("<header>") : text.index("</header>")]
    assert head.index("<code>lora rank 16 all</code> has the best val accuracy") < head.index("Command:")
    assert escape(choice.tests.split(" (")[0]) in head
    sections = re.findall(r'<section id="(\w+)">', text)
    assert sections == ["figures", "tables", "failures", "environment", "differences", "paper"]
    assert re.findall(r'<figure id="figure-(\w+)">', text)[0] == "memory"
    leading = [cell["name"] for cell in data_of(text)["cells"] if cell["leads"]]
    assert leading == ["lora, rank 16, all"]


def test_of_many_choices_the_first_are_in_sight(frame: pd.DataFrame) -> None:
    text = page(
        title="t", summary=[], tables=[], cells=cells(frame), frame=frame, curves={}, environment=[], failures=[],
        choices=choices(best_cells(cells(frame))) * 8,
    )  # fmt: skip
    shown, folded = text[text.index("<header>") : text.index("</header>")].split("<summary>2 more</summary>")
    assert (shown.count("has the best"), folded.count("has the best")) == (6, 2)


def test_the_same_runs_give_the_same_bytes(frame: pd.DataFrame) -> None:
    assert make(frame) == make(frame.copy())


def test_nothing_is_fetched(frame: pd.DataFrame) -> None:
    own = make(frame).replace(get_plotlyjs().replace("\r\n", "\n"), "")
    assert "://" not in own
    assert "@import" not in own
    tags = Tags(own)
    for _, attributes in tags.found:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    policy = tags.named("meta")[1]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy


def test_data_of_the_figures(frame: pd.DataFrame) -> None:
    data = data_of(make(frame))
    assert data["series"] == ["full", "head_only", "lora, all", "lora, qv"]
    assert data["parts"] == ["weights (MiB)", "gradients (MiB)", "optimizer (MiB)", "activations (MiB)"]
    cell = next(cell for cell in data["cells"] if cell["name"] == "lora, rank 4, qv" and cell["rate"] == 0.001)
    assert cell["best"]
    assert cell["params"] == 4000
    assert cell["parts"] == [64.0, None, None, 32.0]
    assert cell["runs"] == ["lora-4-qv-0.001-s0", "lora-4-qv-0.001-s1"]
    assert cell["lines"] == [
        "learning rate 0.001",
        "test accuracy 0.8142 ± 0.0014 (n=2)",
        "val accuracy 0.8242 ± 0.0014 (n=2)",
        "peak memory 144.1 MiB",
        "adapter params 4,000",
        "runs: 2 finished",
    ]
    failed = next(cell for cell in data["cells"] if cell["rank"] == 64)
    assert failed["test"] is None
    assert failed["lines"] == ["learning rate 0.001", "runs: 1 failed"]


def test_cells_of_two_recipes_are_not_joined(tmp_path: Path) -> None:
    for rank in (1, 4, 16):
        save(tmp_path, "lora", 0, 0.001, rank=rank, placement="qv")
    save(tmp_path, "lora", 0, 0.001, rank=2, placement="qv", note="another recipe")
    assert data_of(make(load_runs(tmp_path).frame, tables=[]))["series"] == ["lora, qv", "lora, qv [1]"]


def test_data_of_a_run(frame: pd.DataFrame) -> None:
    data = data_of(make(frame))
    run = data["runs"]["lora-4-qv-0.01-s1"]
    assert dict(zip(data["varying"], run["settings"], strict=True)) == {
        "config.method.name": "lora",
        "config.rank.rank": "4",
        "config.rank.alpha": "16.0",
        "config.target_layers.name": "qv",
        "config.target_layers.blocks": "all",
        "config.trainer.learning_rate": "0.01",
        "config.seed": "1",
    }
    assert data["settings"]["config.dataset.name"] == "sst2"
    metrics = dict(zip(data["metrics"], run["metrics"], strict=True))
    assert metrics["step time"] == "123.4 ms"
    assert metrics["peak memory"] == "144.2 MiB"


def test_curves_are_thinned_to_their_ends(frame: pd.DataFrame) -> None:
    steps, values = data_of(make(frame))["curves"]["full-None-None-0.001-s0"]["train_nll"]
    assert len(steps) == len(values) == analysis.page.data.MAX_CURVE_POINTS
    assert (steps[0], steps[-1]) == (1, 300)
    assert values.count(None) <= 1
    assert values[-1] == 0.0066667


def test_the_curves_of_a_cell_have_a_band_over_its_seeds(frame: pd.DataFrame) -> None:
    curves: dict[str, list[dict[str, float]]] = {
        f"full-None-None-0.001-s{seed}": [
            {"step": step, "train_nll": (1 + seed) / step, **({"val_accuracy": 0.1 * step} if seed else {})}
            for step in (1, 2, 4)
        ]
        for seed in (0, 1)
    }
    curves["lora-1-qv-0.001-s0"] = [{"step": 1, "train_nll": 1.0}, {"step": 2, "train_nll": 0.5}]
    # At another rate than the chosen one.
    curves["lora-4-qv-0.01-s0"] = curves["lora-1-qv-0.001-s0"]
    data = data_of(make(frame, curves=curves))
    by_name = {data["cells"][int(place)]["name"]: bands for place, bands in data["bands"].items()}
    assert by_name == {
        # Without the accuracy, which one of its runs does not have.
        "full": {"train_nll": [[1, 2, 4], [1.5, 0.75, 0.375], [1.0, 0.5, 0.25], [2.0, 1.0, 0.5], 2]},
        "lora, rank 1, qv": {"train_nll": [[1, 2], [1.0, 0.5], [1.0, 0.5], [1.0, 0.5], 1]},
    }


def test_settings_that_differ_are_listed_with_their_counts(frame: pd.DataFrame) -> None:
    text = make(frame)
    assert "<code>trainer.learning_rate</code></td><td>0.001 (17), 0.01 (2)</td>" in text
    assert "<code>dataset.name</code>" not in text


def test_above_the_limit_the_chosen_cells_keep_their_details(
    frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis.page.data, "MAX_DETAILED_RUNS", 17)
    text = make(frame)
    assert "Settings, metrics and curves of 17 of 19 runs are in this page" in text
    assert set(frame["run_id"]) - set(data_of(text)["runs"]) == {"lora-4-qv-0.01-s0", "lora-4-qv-0.01-s1"}


def test_a_page_without_a_finished_run(tmp_path: Path) -> None:
    save(tmp_path, "lora", 0, 0.001, rank=1, placement="qv", status=Status.DIVERGED)
    data = data_of(make(load_runs(tmp_path).frame, tables=[], curves={}))
    assert [cell["lines"] for cell in data["cells"]] == [["learning rate 0.001", "runs: 1 diverged"]]


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def open_page(browser: Any, path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    browser.get(path.as_uri())
    return path.as_uri()


def check_quiet(browser: Any, address: str) -> None:
    """No message on the console, and no request but for the page itself."""
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert address in requests
    assert [url for url in requests if url != address and not url.startswith(("data:", "blob:"))] == []


def column(browser: Any, number: int) -> list[str]:
    script = "return [...document.querySelectorAll(`#tables tbody tr:not([hidden]) td:nth-child(${arguments[0]})`)]"
    return list(browser.execute_script(f"{script}.map((field) => field.textContent)", number))


def mouse(browser: Any) -> Any:
    from selenium.webdriver.common.action_chains import ActionChains

    return ActionChains(browser)


def hover_text(browser: Any, mark: Any) -> str:
    layers = "return [...document.querySelectorAll('.hoverlayer')].map((layer) => layer.textContent).join('')"
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    before = browser.execute_script(layers)
    mouse(browser).move_to_element(mark).perform()
    for _ in range(50):
        shown = browser.execute_script(layers)
        if shown and shown != before:
            return str(shown)
        time.sleep(0.05)
    return ""


@pytest.mark.browser
def test_a_reader_sorts_filters_points_and_clicks(browser: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    address = open_page(browser, tmp_path / "page.html", make(frame))

    # Sorting: by number, the missing last both ways, then as it was.
    unsorted = column(browser, 2)
    button = browser.find_element("css selector", "#tables th:nth-child(2) button")
    button.send_keys("\n")
    assert column(browser, 2) == ["1", "1", "4", "4", "4", "16", "16", "64", "–", "–"]  # noqa: RUF001
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    button.click()
    assert column(browser, 2) == ["64", "16", "16", "4", "4", "4", "1", "1", "–", "–"]  # noqa: RUF001
    button.click()
    assert column(browser, 2) == unsorted

    # Filters: of the rows by text, of rows and points by method.
    points = "#figure-memory .point"
    assert len(browser.find_elements("css selector", points)) == 8
    browser.find_element("id", "filter").send_keys("LORA 16")
    assert column(browser, 2) == ["16", "16"]
    assert browser.find_element("id", "shown").text == "2 of 10 rows"
    browser.find_element("id", "filter").clear()
    browser.execute_script("document.getElementById('filter').dispatchEvent(new Event('input'))")
    browser.find_element("css selector", "#method option[value=full]").click()
    assert column(browser, 1) == ["full"]
    assert len(browser.find_elements("css selector", points)) == 1

    # Under a figure, only what is said of marks that are there.
    caption = browser.find_element("css selector", "#figure-rank figcaption")
    browser.find_element("css selector", "#method option[value=lora]").click()
    assert caption.text == "Bars: sample standard deviation."
    browser.find_element("css selector", "#method option[value='']").click()
    assert caption.text == "Dashed: conditions without a rank. Bars: sample standard deviation."

    # All six figures, and no button that sends their data away.
    figures = [name for name in browser.find_elements("css selector", "figure .js-plotly-plot") if name.is_displayed()]
    assert len(figures) == 6
    assert len(browser.find_elements("css selector", ".modebar-btn")) == 6 * 4

    # Of every chosen cell a curve and a band over its two seeds; of the failed run a curve.
    assert len(browser.find_elements("css selector", "#figure-curves .lines .js-line")) == 2 * 8 + 1

    # Pointing and clicking.
    mark = browser.find_elements("css selector", "#figure-memory .point")[-1]
    assert "lora, rank 16, qvlearning rate 0.001test accuracy 0.8319 ± 0.0014 (n=2)" in hover_text(browser, mark)
    mouse(browser).click().perform()  # plots listen on a layer above their marks
    panel = browser.find_element("id", "details")
    assert panel.find_element("css selector", "h3").text == "lora, rank 16, qv"
    assert [run.text for run in panel.find_elements("css selector", ".run > summary")] == [
        "lora-16-qv-0.001-s0finished",
        "lora-16-qv-0.001-s1finished",
    ]
    assert "step time\n123.4 ms" in panel.text
    assert "learning_rate: 0.001" in panel.text
    assert panel.find_elements("css selector", ".js-plotly-plot")

    # A row does the same, from the keyboard; Escape closes and returns.
    browser.find_element("css selector", "#tables tbody tr").send_keys("\n")
    assert panel.find_element("css selector", "h3").text == "full"
    browser.switch_to.active_element.send_keys("\ue00c")
    assert not panel.is_displayed()
    assert browser.switch_to.active_element.tag_name == "tr"
    check_quiet(browser, address)


@pytest.mark.browser
def test_the_marks_of_a_figure_are_reached_from_the_keyboard(browser: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    address = open_page(browser, tmp_path / "page.html", make(frame))

    def press(*keys: str) -> str:
        """What is said after these keys, once the tooltip says the same."""
        mouse(browser).send_keys(*keys).perform()
        shown, said = "", "-"
        for _ in range(40):
            shown, said = browser.execute_script(
                "return ['#figure-memory .hoverlayer', '.spoken'].map((at) => document.querySelector(at).textContent)"
            )
            if shown.replace(", ", "") == said.replace(", ", ""):
                return str(said)
            time.sleep(0.05)
        raise AssertionError(f"shown {shown!r}, said {said!r}")

    right, left, down, up, end = "\ue014", "\ue012", "\ue015", "\ue013", "\ue010"
    browser.find_element("id", "method").send_keys("")
    plot = browser.find_element("css selector", "#figure-memory .plot")
    assert press("\ue004").startswith("full, learning rate 0.001, test accuracy")
    assert browser.switch_to.active_element == plot
    assert press(right).startswith("head_only, ")
    assert press(left).startswith("full, ")
    assert press(left).startswith("full, ")
    assert press(down, down).startswith("lora, rank 1, all, ")
    assert press(right).startswith("lora, rank 4, all, ")
    assert press(down, end).startswith("lora, rank 16, qv, ")
    assert press(right, down).startswith("lora, rank 16, qv, ")
    assert press(up).startswith("lora, rank 16, all, ")

    press("\n")
    panel = browser.find_element("id", "details")
    assert panel.find_element("css selector", "h3").text == "lora, rank 16, all"
    assert press("\ue00c").startswith("lora, rank 16, all")
    assert browser.switch_to.active_element == plot

    # Tab moves to the next figure; what a filter leaves is what can be reached.
    mouse(browser).send_keys("\ue004").perform()
    assert browser.switch_to.active_element != plot
    browser.find_element("css selector", "#method option[value=full]").click()
    browser.execute_script("arguments[0].focus()", plot)
    assert press(end, down, right).startswith("full, ")
    check_quiet(browser, address)


@pytest.mark.browser
def test_notes_are_folded_and_open_in_print(browser: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    address = open_page(browser, tmp_path / "page.html", make(frame, tables=[table(frame), table(frame)]))
    first, second = browser.find_elements("css selector", "details.notes")
    note = first.find_element("css selector", "li")
    assert first.text == "1 note"
    assert not note.is_displayed()
    second.find_element("css selector", "summary").click()
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert note.is_displayed()
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert not note.is_displayed()
    assert second.find_element("css selector", "li").is_displayed()
    check_quiet(browser, address)


@pytest.mark.browser
def test_more_than_thirteen_conditions_are_small_multiples(browser: Any, tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    for rate in (0.001, 0.01):
        for placement in ("q", "v", "qv"):
            for rank in (1, 2, 4, 8):
                save(runs_dir, "lora", 0, rate, rank=rank, placement=placement)
        for method in ("full", "head_only"):
            save(runs_dir, method, 0, rate)
    address = open_page(browser, tmp_path / "page.html", make(load_runs(runs_dir).frame, tables=[]))
    for name in ("rate", "curves"):
        figure = browser.find_element("id", f"figure-{name}")
        titles = [title.text for title in figure.find_elements("css selector", ".annotation")]
        assert titles == ["lora, q", "lora, qv", "lora, v", "others"]
        assert len(figure.find_elements("css selector", ".cartesianlayer > .subplot")) == 4
        legend = [entry.text for entry in figure.find_elements("css selector", ".legendtext")]
        assert legend == ["rank 1", "rank 2", "rank 4", "rank 8", "full", "head_only"]
    # The keyboard goes from one into the next.
    plot = browser.find_element("css selector", "#figure-rate .plot")
    mouse(browser).send_keys("").perform()
    browser.execute_script("arguments[0].focus({focusVisible: true})", plot)
    mouse(browser).send_keys("\ue015" * 4).perform()
    said = browser.find_element("css selector", ".spoken")
    assert said.get_attribute("textContent").startswith("lora, rank 1, qv, learning rate 0.001")
    # Within the limit they share one plot.
    browser.find_element("css selector", "#method option[value=lora]").click()
    assert len(browser.find_elements("css selector", "#figure-rate .cartesianlayer > .subplot")) == 1
    check_quiet(browser, address)


@pytest.mark.browser
def test_on_a_small_screen_legends_are_whole_and_ticks_apart(browser: Any, tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    for rank in (1, 4, 16, 64):
        for placement in ("qv", "all"):
            save(runs_dir, "lora", 0, 0.001, rank=rank, placement=placement, flops=5e12)
    for method, flops in (("full", 8e12), ("head_only", 2.4e12), ("bitfit", 4.9e12), ("norms", 5.1e12)):
        save(runs_dir, method, 0, 0.001, flops=flops)
    size = browser.get_window_size()
    browser.set_window_size(500, 1000)
    try:
        address = open_page(browser, tmp_path / "page.html", make(load_runs(runs_dir).frame, tables=[]))
        assert len(browser.find_elements("css selector", "#figure-curves .legendtext")) == 12
        for figure in browser.find_elements("css selector", "figure[id]:not([hidden])"):
            name = figure.get_attribute("id")
            bars = figure.find_elements("css selector", ".legend .scrollbar")
            assert [bar.get_attribute("height") for bar in bars if bar.get_attribute("height") != "0"] == [], name
            ticks = [tick.rect for tick in figure.find_elements("css selector", ".xtick text")]
            assert len(ticks) > 1, name
            ticks.sort(key=lambda rect: rect["x"])
            gaps = [right["x"] - left["x"] - left["width"] for left, right in pairwise(ticks)]
            assert min(gaps) >= 4, name
        check_quiet(browser, address)
    finally:
        browser.set_window_size(size["width"], size["height"])


@pytest.mark.browser
def test_an_axis_between_two_ticks_is_marked_at_its_ends(browser: Any, tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    for method, flops in (("full", 4.6e12), ("head_only", 3.3e12)):
        save(runs_dir, method, 0, 0.001, flops=flops)
    address = open_page(browser, tmp_path / "page.html", make(load_runs(runs_dir).frame, tables=[]))
    ticks = browser.find_elements("css selector", "#figure-compute .xtick text")
    assert [tick.text for tick in ticks] == ["3.3T", "4.6T"]
    check_quiet(browser, address)


@pytest.mark.browser
def test_one_seed_has_no_bars_and_no_word_of_them(browser: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    one = make(frame[frame["config.seed"] == 0].reset_index(drop=True))
    address = open_page(browser, tmp_path / "page.html", one)
    assert browser.find_element("css selector", "#figure-memory figcaption").text.endswith("Large: best on val.")
    check_quiet(browser, address)


@pytest.mark.browser
def test_hostile_text_is_shown_as_text(browser: Any, hostile: pd.DataFrame, tmp_path: Path) -> None:
    address = open_page(browser, tmp_path / "page.html", make(hostile, title=SCRIPT))
    assert browser.title == SCRIPT
    marks = browser.find_elements("css selector", "#figure-memory .point")
    shown = "".join(hover_text(browser, mark) for mark in marks)
    # With the mark of another recipe.
    assert f"lora{IMAGE}, rank 8, {LINK} %{{x}} $x$ [1]learning rate" in shown
    assert f"lora{IMAGE}, rank 4, {SCRIPT}learning rate" in shown
    assert SCRIPT in browser.find_element("css selector", "#figure-memory .legend").text
    for row in browser.find_elements("css selector", "#tables tbody tr"):
        row.send_keys("\n")
        browser.execute_script("document.querySelectorAll('.run').forEach((run) => { run.open = true; })")
    assert browser.execute_script("return document.querySelectorAll('img:not([alt=Score])').length") == 0
    check_quiet(browser, address)
