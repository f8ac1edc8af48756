"""The page about a run: what it says, checked against the files it is made from, and what it does in a real browser."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXTS
from hypothesis import given
from hypothesis import strategies as st
from pipelines import Pipeline, build
from transformers import AutoTokenizer

from utils.datastore.chunk_lists import ChunkListPaths
from utils.datastore.provenance import find_windows
from utils.decoding.acceptance import Acceptance, AcceptanceMap
from utils.decoding.types import (
    AcceptedChunk,
    Generation,
    GenerationStats,
    ProposalRecord,
    StepRecord,
    Trace,
    text_pieces,
)
from utils.evaluation.report.page import ReportRun, as_data, write_report
from utils.evaluation.report.rescore import RescoredProposal, RescoredText
from utils.json_io import json_list_writer
from utils.manifest import begin_stage, finish_stage

HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"><!-- ]]> {{data}} &lt;b&gt;',
    "\u2028\u2029\u202e\ufeff\x00\x1b[31m\x7f\x85 \ud800 \udfff 🙂 e\u0301 </title></style>",
    "<svg onload=window.hacked=3><iframe srcdoc='<script>parent.hacked=4</script>'></iframe>",
)
THETA = 0.7  # of which some of the made run is above and some below
RUN = f"generation_t{THETA}"
SHORT = ("--max_new_tokens", 24, "--temperature", 0)


# ---- Runs to look at


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    texts = [*TEXTS, "".join(text.encode("utf-8", "ignore").decode() for text in HOSTILE) * 4]
    return build(gpt2_folder, tmp_path_factory.mktemp("report"), run_stage, texts)


@pytest.fixture(scope="module")
def reported(made: Pipeline, run_stage: Callable[..., None]) -> Path:
    """A folder with chunks taken and left at θ, the baseline beside them, and report.html."""
    save_dir = made.root / "results"
    flags = ("--similarity_threshold", THETA, "--compare_baseline", "--report", save_dir / "report.html")
    run_stage("eval.py", *made.eval_flags(save_dir, *flags, *SHORT))
    return save_dir


def stored(save_dir: Path, index: int) -> dict[str, Any]:
    return json.loads((save_dir / f"prompt_{index}.json").read_text(encoding="utf-8"))


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)])


def hand_made(
    path: Path, n_texts: int = 1, n_tokens: int = 6, left: tuple[float, float | None] = (0.5, None), **changed: Any
) -> None:
    """A page of hostile texts: of every three tokens a chunk of two, and one that was proposed and not taken.

    left: the similarity of the latter, and what the LM gave to their first token where it was asked.
    """

    def decode(token_ids: list[int]) -> str:
        return "".join(HOSTILE[token_id % len(HOSTILE)] for token_id in token_ids)

    def text(index: int) -> tuple[Generation, Generation]:
        chunks = [AcceptedChunk(at, [at, at + 1], 0.95) for at in range(2, n_tokens, 3)]
        taken = [ProposalRecord(chunk.position, chunk.position, 0.95) for chunk in chunks]
        others = [ProposalRecord(chunk.position + 2, 0, *left) for chunk in chunks]
        steps = [StepRecord(end, 0.1 * end, 0.01 * end, 0.001 * end, 0) for end in range(2, n_tokens + 3)]
        stats = GenerationStats(n_tokens, 1.0, 0.9, 0.05)
        generation = Generation(
            index, [0, 1], list(range(2, n_tokens + 2)), chunks, stats, Trace(steps, sorted(taken + others))
        )
        return generation, Generation(index, [0, 1], list(range(n_tokens)), [], stats)

    def rescored(generation: Generation) -> RescoredText:
        assert generation.trace is not None
        proposals = [
            RescoredProposal(proposal, 1, [2, 3], 0, 0, [([1], 0.4), ([0, 1, 2], 0.25)], 0.5)
            for proposal in generation.trace.proposals
        ]
        return RescoredText(np.full(len(generation.token_ids), -1.0), proposals)

    settings: dict[str, Any] = {
        "name": RUN,
        "title": HOSTILE[0],
        "facts": [(HOSTILE[1], HOSTILE[2])],
        "similarity_threshold": 0.9,
        "min_first_token_prob": 0.0,
        "reject_repeats": False,
        "policy": "threshold",
        "acceptance_map": AcceptanceMap.from_threshold(0.9, 0.999),
        "is_fitted": False,
        "corpus": HOSTILE[2],
        "trie_folder": None,
    }
    write_report(
        path, ReportRun(**settings | changed), {"runs": {}}, (text(i) for i in range(n_texts)), decode, rescored
    )


# ---- What is put into the page


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_data_comes_back_unchanged_and_can_end_no_element(value: Any) -> None:
    text = as_data(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029\ufeff")
    text.encode("utf-8")


def test_lone_surrogates_come_back_and_can_be_written() -> None:
    text = as_data(["\ud800", "\udfff<"])
    assert text == '["\\ud800","\\udfff\\u003c"]'
    assert json.loads(text) == ["\ud800", "\udfff<"]


def test_the_page_is_reproducible_and_says_what_the_files_say(made, reported, run_stage, tmp_path) -> None:
    again = tmp_path / "deep" / "again.html"
    flags = ("--similarity_threshold", THETA, "--compare_baseline", "--report", again)
    run_stage("eval.py", *made.eval_flags(reported, *flags, *SHORT))
    assert again.read_bytes() == (reported / "report.html").read_bytes()
    data = data_of(again)
    assert len(data["texts"]) == 4
    n_proposals = 0
    for text in data["texts"]:
        found = stored(reported, text["index"])
        trace, generation = found["trace"][RUN], found["generation"]
        n_prompt = found["metrics"][RUN]["prompt_tokens"]
        assert "".join(text["tokens"]) == generation[f"{RUN}_text"]
        assert text["baseline"]["text"] == generation["baseline_generation_text"]
        assert text["chunks"] == [
            [phrase["position"] - n_prompt, len(phrase["token_ids"]), math.floor(phrase["similarity"] * 1e6 + 1e-6)]
            for phrase in generation[f"{RUN}_retrieved_phrases"]
        ]
        assert [proposal[0] + n_prompt for proposal in text["proposals"]] == trace["proposal_positions"]
        assert sum(proposal[3] for proposal in text["proposals"]) == len(text["chunks"])
        n_proposals += len(text["proposals"])
    histogram = data["histogram"]
    assert sum(histogram["accepted"]) + sum(histogram["rejected"]) == n_proposals
    assert sum(histogram["accepted"]) == sum(n for _, n in data["lengths"]) > 0
    assert sum(histogram["rejected"]) > 0


def test_sources_show_entry_token_and_chunk_in_their_window(made, reported) -> None:
    data = data_of(reported / "report.html")
    tokenizer: Any = AutoTokenizer.from_pretrained(made.model)
    assert len(data["rows"]) > 10
    for string, n_tokens, window, place, segment, start, first, end, lowest in data["rows"]:
        rows = json.loads((made.windows / f"token_probs_{window}.json").read_text(encoding="utf-8"))
        ids = [row[4] for row in rows]
        number, from_token, text = data["segments"][segment]
        units = text.encode("utf-16-le", "surrogatepass")
        head, entry, chunk = (
            units[2 * a : 2 * b].decode("utf-16-le", "surrogatepass")
            for a, b in ((0, start), (start, first), (first, end))
        )
        assert number == window
        assert from_token <= max(place - 60, 0)
        assert text in tokenizer.decode(ids) or "\ufffd" in text
        assert head + entry + chunk == "".join(
            text_pieces(ids[from_token : place + 1 + n_tokens], [], tokenizer.decode)
        ) or ("\ufffd" in text)
        assert data["strings"][string] == tokenizer.decode(ids[place + 1 : place + 1 + n_tokens])
        assert lowest == pytest.approx(min(row[1] for row in rows[place + 1 : place + 1 + n_tokens]), abs=6e-4)


def test_the_page_says_why_a_source_is_not_shown(made, reported, run_stage, tmp_path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(made.root, root)
    copied = Pipeline(made.model, root)
    path = find_windows(copied.tries)
    flags = ("--similarity_threshold", THETA, "--compare_baseline", *SHORT, "--report", tmp_path / "page.html")

    def note() -> str:
        run_stage("eval.py", *copied.eval_flags(root / "results", *flags))
        data = data_of(tmp_path / "page.html")
        assert all(len(row) == 4 for row in data["rows"])
        return data["sourceNote"]

    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'", 0.0, 0, 0,', b'", 0.0, 7, 0,', 1))
    assert "is not window 0" in note()
    manifest = ChunkListPaths(root / "tries", "texts", "ds", "train", 0.1).manifest
    manifest.write_text(manifest.read_text().replace('"windows_fingerprint": "', '"windows_fingerprint": "0'))
    assert "is of another text" in note()
    path.unlink()
    assert f"{path}: is not there any more" in note()


def test_a_page_too_large_leaves_texts_out_and_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("utils.evaluation.report.page.MAX_TOKENS", 13)
    hand_made(tmp_path / "page.html", n_texts=4, n_tokens=6)
    data = data_of(tmp_path / "page.html")
    assert len(data["texts"]) == 2
    assert data["leftOut"] == 2
    assert data["lengths"] == [[2, 8]]  # of all four
    monkeypatch.setattr("utils.evaluation.report.page.MAX_TOKENS", 1)
    hand_made(tmp_path / "page.html", n_texts=4, n_tokens=6)
    assert len(data_of(tmp_path / "page.html")["texts"]) == 1


def test_a_page_short_of_room_keeps_sources_of_accepted_chunks(tmp_path, monkeypatch) -> None:
    words = load_words()
    sizes = {}
    for room in (10**6, 1500):
        monkeypatch.setattr("utils.evaluation.report.page.SOURCE_TOKENS", room)
        (tmp_path / str(room)).mkdir()
        page = tmp_path / str(room) / "page.html"
        write_large(page, words, n_texts=2, n_tokens=100, n_windows=50)
        data = data_of(page)
        accepted = {proposal[2] for text in data["texts"] for proposal in text["proposals"] if proposal[3]}
        placed = {i for i, row in enumerate(data["rows"]) if len(row) > 4}
        assert placed == (accepted if room == 1500 else set(range(len(data["rows"]))))
        assert bool(data["sourceNote"]) == (room == 1500)
        sizes[room] = sum(len(text) for _, _, text in data["segments"])
        for i in placed:
            string, _, _, _, segment, _, first, end, _ = data["rows"][i]
            assert data["segments"][segment][2][first:end] == data["strings"][string]
    assert sizes[1500] < sizes[10**6]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--perplexity_file", "x.json", "--report", "r.html"),
            "--report is of what is generated, so it needs --prompt_file",
        )
    ],
)
def test_a_report_without_prompts_is_refused(refusal, tmp_path, flags, message) -> None:
    assert message in refusal("eval.py", "--model_path", "x", "--save_dir", tmp_path, "--gen_baseline_only", *flags)


# ---- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium; as root: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Look:
    """Opens pages and notes what goes wrong in them."""

    def __init__(self, browser: Any) -> None:
        self.browser, self.troubles, self.contexts = browser, list[str](), list[Any]()

    def __call__(self, path: Path, width: int = 1280, **settings: Any) -> Any:
        if width < 600:
            settings |= {"has_touch": True, "is_mobile": True}
        context = self.browser.new_context(viewport={"width": width, "height": 844}, **settings)
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.troubles.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: self.troubles.extend({request.url} - {path.as_uri()}))
        page.goto(path.as_uri())
        return page


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Any]]:
    """look(path, width) opens a page; the test fails where it asked for anything or said anything."""
    opener = Look(browser)
    yield opener
    for context in opener.contexts:
        context.close()
    assert opener.troubles == []


def is_card_open(page: Any) -> bool:
    return not page.evaluate("document.getElementById('card').hidden")


def test_hostile_text_is_shown_and_runs_nothing(look, tmp_path) -> None:
    hand_made(tmp_path / "page.html", n_texts=3, n_tokens=9)
    page = look(tmp_path / "page.html")
    shown = page.locator("article").first.inner_text()
    assert '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">' in shown
    assert "␀␛[31m␡" in shown
    assert not set("\u202e\x00\x1b\x7f\x85") & set(page.locator("main").text_content())
    for i in range(page.locator("article").first.locator(".chunk").count()):
        page.locator(".chunk").nth(i).focus()
        assert "<svg onload=window.hacked=3>" in page.locator("#card").inner_text()
    page.keyboard.press("Escape")
    page.locator("details").first.click()
    wait_until(page, "document.querySelector('details').open")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('img, iframe, svg[onload], script').length") == 2
    assert page.title() == HOSTILE[0]


def test_the_pages_policy_lets_no_other_script_or_image_in(browser, tmp_path) -> None:
    hand_made(tmp_path / "page.html")
    opener = Look(browser)
    page = opener(tmp_path / "page.html")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            const image = document.createElement("img");
            image.setAttribute("onerror", "window.hacked = 2");
            image.src = "https://example.invalid/x.png";
            document.body.append(image);
        }"""
    )
    for kind in ("script-src", "default-src"):  # an image falls under the latter
        for _ in range(200):
            if any("Content Security Policy" in trouble and kind in trouble for trouble in opener.troubles):
                break
            page.wait_for_timeout(25)
        else:
            raise AssertionError(f"{kind} refused nothing: {opener.troubles}")
    assert page.evaluate("typeof window.hacked") == "undefined"
    opener.contexts[0].close()


def card_terms(page: Any) -> dict[str, str]:
    names, values = page.locator("#card dt").all_inner_texts(), page.locator("#card dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize(
    ("left", "changed", "verdict", "state"),
    [
        ((0.95, 0.1), {"min_first_token_prob": 0.3}, 2, "the LM gives its first token less than δ = 0.3"),
        ((0.95, None), {"reject_repeats": True}, 3, "the text would repeat itself"),
    ],
)
def test_the_card_of_a_rejected_chunk_names_the_rule(
    look, tmp_path, left: tuple[float, float | None], changed: dict[str, Any], verdict: int, state: str
) -> None:
    hand_made(tmp_path / "report.html", left=left, **changed)
    proposals = data_of(tmp_path / "report.html")["texts"][0]["proposals"]
    assert [proposal[3] for proposal in proposals][:2] == [1, verdict]
    page = look(tmp_path / "report.html")
    page.locator(".other.on").first.hover()
    wait_until(page, "!document.getElementById('card').hidden")
    assert state in page.locator("#card .state").inner_text()
    assert card_terms(page)["First token"] == "0.500 of the LM's likeliest"


@pytest.mark.parametrize("way", ["hover", "tap", "keyboard"])
def test_a_chunks_card_says_where_it_is_from(look, reported, way) -> None:
    page = look(reported / "report.html", 390 if way == "tap" else 1280)
    article = next(i for i in range(4) if len(data_of(reported / "report.html")["texts"][i]["chunks"]) > 1)
    chunks = page.locator("article").nth(article).locator(".chunk")
    chunks.nth(1).scroll_into_view_if_needed()
    if way == "keyboard":
        chunks.nth(1).evaluate("chunk => chunk.closest('article').querySelector('[tabindex=\"0\"]').focus()")
        page.keyboard.press("ArrowRight")
    elif way == "tap":
        chunks.nth(1).tap()
    else:
        chunks.nth(1).hover()
    wait_until(page, "!document.getElementById('card').hidden")
    found = stored(reported, article)
    phrase = found["generation"][f"{RUN}_retrieved_phrases"][1]
    terms = card_terms(page)
    assert float(terms["Similarity"]) == pytest.approx(phrase["similarity"], abs=6e-5)
    g = float(Acceptance(THETA, q_max=0.999).map(phrase["similarity"]))
    assert float(terms["Acceptance probability"]) == pytest.approx(g, abs=6e-4)
    assert "Entry token" in terms
    card = page.locator("#card")
    chunk = data_of(reported / "report.html")["texts"][article]["proposals"]
    chunk = next(
        proposal for proposal in chunk if proposal[0] == phrase["position"] - found["metrics"][RUN]["prompt_tokens"]
    )
    data = data_of(reported / "report.html")
    wanted = data["strings"][data["rows"][chunk[2]][0]]
    if wanted.isprintable() and wanted.strip():
        assert card.locator("blockquote mark").text_content() == wanted
    assert card.locator("li").count() == len(chunk[7]) == 3
    box = card.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= page.viewport_size["width"]
    page.keyboard.press("Escape")
    assert not is_card_open(page)


def n_coloured(page: Any, theta: float | None) -> int:
    """Marks in colour at θ (None: as generated), text by text: those out of sight wait with their colours."""
    shown_at = "null" if theta is None else str(round(theta * 1e6))
    counts = []
    for i, article in enumerate(page.locator("article").all()):
        article.evaluate("article => article.scrollIntoView()")
        wait_until(page, f"document.querySelectorAll('article')[{i}].shownAt === {shown_at}")
        counts.append(article.locator(".chunk:not(.off), .other.on").count())
    return sum(counts)


@pytest.mark.parametrize("width", [390, 1280])
def test_theta_recolours_the_proposals_at_or_above_it(look, reported, width) -> None:
    page = look(reported / "report.html", width)
    for article in page.locator("article").all():
        article.evaluate("article => article.upgrade()")
    similarities = [s for i in range(4) for s in stored(reported, i)["trace"][RUN]["proposal_similarities"]]
    n_taken = page.locator(".chunk").count()
    assert n_taken == sum(len(stored(reported, i)["generation"][f"{RUN}_retrieved_phrases"]) for i in range(4))
    said = page.locator(".bar .said")
    assert f"{n_taken} of {len(similarities)} proposals were accepted" in said.inner_text()
    slider = page.locator("#theta")
    for theta in (0.65, 0.75, 1.0, float(slider.get_attribute("min"))):
        slider.fill(str(theta))
        wanted = sum(similarity >= theta for similarity in similarities)
        assert n_coloured(page, theta) == wanted
        assert f"{wanted} of {len(similarities)} would be accepted, {n_taken} were" in said.inner_text()
    page.get_by_role("button", name="as it was").click()
    assert n_coloured(page, None) == n_taken
    assert page.locator(".chunk.off, .other.on").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll_and_all_is_printed(look, reported, scheme) -> None:
    page = look(reported / "report.html", 390, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    page.pdf()
    page.emulate_media(media="print")
    assert page.evaluate("[...document.querySelectorAll('article')].every((article) => article.isUpgraded)")


def test_pointing_at_the_timeline_names_the_pass(look, reported) -> None:
    page = look(reported / "report.html")
    line = page.locator(".timeline svg").first
    line.scroll_into_view_if_needed()
    box = line.bounding_box()
    steps = data_of(reported / "report.html")["texts"][0]["steps"]
    page.mouse.move(box["x"] + 1, box["y"] + 20)
    said = "document.querySelector('.timeline .small').textContent"
    wait_until(page, f"{said}.includes('LM {steps['lm'][1] / 1000:.1f} ms')")
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 20)
    wait_until(page, f"{said}.startsWith('Pass {len(steps['lm'])},')")


VARIANTS: dict[str, tuple[object, ...]] = {
    "nothing retrieved": ("--similarity_threshold", 1.0, "--compare_baseline"),
    "no chunk accepted": ("--similarity_threshold", 0.99999),
    "everything accepted": ("--similarity_threshold", -1.0, "--compare_baseline"),
    "bernoulli": ("--similarity_threshold", 0.9, "--acceptance", "bernoulli"),
    "verified": ("--decoding", "verify", "--compare_baseline", "--draft_growth", "full"),
    "the model alone": ("--gen_baseline_only",),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_has_a_page_without_errors(made, look, run_stage, tmp_path, variant) -> None:
    (tmp_path / "one.json").write_text(json.dumps(["the cat sat on"]))
    flags = made.eval_flags(tmp_path, *VARIANTS[variant], *SHORT, "--report", tmp_path / "page.html")
    flags[flags.index(made.root / "prompts.json")] = tmp_path / "one.json"
    run_stage("eval.py", *flags)
    page = look(tmp_path / "page.html")
    (path,) = tmp_path.glob("prompt_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    name = next(iter(sorted(found["settings"], key=lambda name: name == "baseline_generation")))
    wait_until(page, "document.querySelector('article').isUpgraded")
    texts = page.locator("article .columns .text").all_text_contents()
    assert len(texts) == len(found["settings"])
    assert len(texts[0]) == len(found["generation"][f"{name}_text"])
    n_chunks = len(found["generation"].get(f"{name}_retrieved_phrases", []))
    if variant != "verified":
        assert page.locator(".chunk").count() == n_chunks
    else:
        n_confirmed = page.evaluate("[...document.querySelectorAll('.chunk')].reduce((n, c) => n + c.mark.n, 0)")
        assert n_confirmed == found["metrics"][name]["accepted_tokens"] > 0
        page.locator(".chunk").first.hover()
        assert "Drafted" in card_terms(page)
    assert page.locator("#theta").count() == (variant in ("no chunk accepted", "everything accepted", "bernoulli"))


def test_runs_without_traces_have_a_page_that_says_so(made, look, run_stage, tmp_path, reported) -> None:
    shutil.copytree(reported, tmp_path / "old")
    for path in (tmp_path / "old").glob("prompt_*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        del results["trace"]
        path.write_text(json.dumps(results))
    flags = ("--similarity_threshold", THETA, "--compare_baseline", "--report", tmp_path / "page.html", *SHORT)
    run_stage("eval.py", *made.eval_flags(tmp_path / "old", *flags))
    new, old = data_of(tmp_path / "page.html"), data_of(reported / "report.html")
    for found, wanted in zip(new["texts"], old["texts"], strict=True):
        assert [proposal[0] for proposal in found["proposals"]] == [proposal[0] for proposal in wanted["proposals"]]
    page = look(tmp_path / "page.html")
    assert "before steps were recorded" in page.locator("main").inner_text()
    assert page.locator(".timeline").count() == 0


def test_a_page_of_100000_tokens_is_small_and_opens_lazily(look, tmp_path, gpt2_folder) -> None:
    path = tmp_path / "page.html"
    write_large(path, load_words())
    assert path.stat().st_size < 10e6
    page = look(path)
    # What is not near the screen is plain text yet: its marks, an element each, are to come.
    n_marks = sum(len(text["proposals"]) for text in data_of(path)["texts"])
    assert page.evaluate("document.querySelectorAll('*').length") < n_marks / 10
    assert page.locator("article").count() == 200
    assert (
        page.evaluate("[...document.querySelectorAll('article')].filter((article) => article.isUpgraded).length") < 20
    )
    page.get_by_label("Go to a text").select_option("199")
    wait_until(page, "document.querySelectorAll('article')[199].isUpgraded")


def wait_until(page, expression: str) -> None:
    """Not page.wait_for_function, which asks again by eval, and the page's policy forbids that."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never true: {expression}")


def load_words() -> list[str]:
    """Words of real text, each with the space before it, some 4.5 letters long."""
    return [f" {word}" for word in (TEXTS[0] + TEXTS[3]).split()] + [".", ",", "\n", "ing", "ed"]


N_WINDOW_TOKENS = 512


def window_token(window: int, place: int, n_words: int) -> int:
    return (window * 31 + place * 7 + window * place % 5) % n_words


def write_windows(folder: Path, n_windows: int, n_words: int) -> Path:
    """A trie folder without tries, with the list of the windows that its chunks would be of."""
    labels = {"dataset_name": "x", "model_ds": "m", "partition": "train", "tok_prob_threshold": 0.1}
    lists = ChunkListPaths(folder, *labels.values())  # type: ignore[arg-type]
    trie_folder = folder / "token_trie_x_DSm_Hm" / "train_0.1"
    trie_folder.mkdir(parents=True)
    for path in (lists.manifest, trie_folder / "manifest.json"):
        finish_stage(path, begin_stage(path, "save_token_trie_info.py", labels, {"windows_fingerprint": "f"}), {})
    with json_list_writer(lists.token_prob_list) as write:
        for window in range(n_windows):
            ids = (window_token(window, place, n_words) for place in range(N_WINDOW_TOKENS))
            write([["", 0.5, window, place, token_id] for place, token_id in enumerate(ids)])
    return trie_folder


def write_large(path: Path, words: list[str], n_texts: int = 200, n_tokens: int = 500, n_windows: int = 300) -> None:
    """Every step has a proposal, half are accepted, each of a row of its own."""
    rng = np.random.default_rng(0)
    n_words = len(words)

    def decode(ids: list[int]) -> str:
        return "".join(words[i % n_words] for i in ids)

    def texts() -> Iterator[tuple[Generation, Generation]]:
        for index in range(n_texts):
            ids = rng.integers(0, n_words, 40 + n_tokens).tolist()
            lengths = np.where(rng.random(n_tokens) < 0.5, rng.integers(1, 4, n_tokens), 1)
            ends = 40 + np.minimum(np.cumsum(lengths), n_tokens)
            ends = np.unique(ends)
            starts, lengths = ends - np.diff(ends, prepend=40), np.diff(ends, prepend=40)
            similarities = np.where(lengths > 1, 0.9, 0.5) + rng.uniform(0, 0.1, len(ends))
            records = [
                ProposalRecord(*each)
                for each in zip(starts.tolist(), range(len(ends)), similarities.tolist(), strict=True)
            ]
            chunks = [
                AcceptedChunk(at.position, ids[at.position : at.position + n], at.similarity)
                for at, n in zip(records, lengths.tolist(), strict=True)
                if at.similarity >= 0.9
            ]
            steps = [
                StepRecord(end, 0.005 * i, 0.0005 * i, 0.00001 * i, 0) for i, end in enumerate([40, *ends.tolist()], 1)
            ]
            stats = GenerationStats(len(steps), 3.0, 2.5, 0.4)
            generation = Generation(index, ids[:40], ids[40:], chunks, stats, Trace(steps, records))
            yield generation, Generation(index, ids[:40], ids[:n_tokens], [], stats)

    def rescored(generation: Generation) -> RescoredText:
        assert generation.trace is not None
        found = []
        for record in generation.trace.proposals:
            i = generation.index * n_tokens + record.row
            window, place = i % n_windows, i // n_windows % (N_WINDOW_TOKENS - 4)
            entry, *chunk = (window_token(window, place + ahead, n_words) for ahead in range(4))
            rivals = [([i * k % n_words, i % 7], 0.5) for k in (3, 5, 7)]
            found.append(RescoredProposal(record._replace(row=i), entry, chunk, window, place, rivals, 0.5))
        return RescoredText(np.full(len(generation.token_ids), -1.0), found)

    trie_folder = write_windows(path.parent, n_windows, n_words)
    run = ReportRun(
        RUN,
        "large",
        [],
        0.9,
        0.0,
        False,
        "threshold",
        AcceptanceMap.from_threshold(0.9, 0.999),
        False,
        "x",
        trie_folder,
    )
    write_report(path, run, {"runs": {}}, texts(), decode, rescored)
