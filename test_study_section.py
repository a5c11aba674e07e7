import base64
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# The blind study page, driven in a headless Chromium
# -----------------------------------------------------------------------------

QUESTIONS = {"looks": "Which looks better?", "fits": "Which fits the text better?"}
VOTES = {"format": "gentron-votes", "version": 1, "study": "0badcafe"}


def write_study(path):
    """assets/study.html filled as sample.py fills it: 6 pairs, a's pictures red and b's blue."""
    def picture(*colour):
        Image.new("RGB", (8, 8), colour).save(file := io.BytesIO(), "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    pairs = [{"key": f"p{k}", "prompt": f"prompt {k} <i>" + k // 5 * 70 * "x",
              "a": picture(200 + k, 0, 0), "b": picture(0, 0, 200 + k)} for k in range(6)]
    questions = [{"key": key, "text": text} for key, text in QUESTIONS.items()]
    study = {"id": "0badcafe", "title": "zebra against yak", "names": {"a": "zebra", "b": "yak"},
             "questions": questions, "pairs": pairs}
    before, after = (HERE / "assets/study.html").read_text("utf-8").split("/*STUDY*/null")
    path.write_text(before + json.dumps(study).replace("<", "\\u003c") + after, "utf-8")
    return {pair["prompt"]: pair for pair in pairs}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    binary, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options, downloads = webdriver.ChromeOptions(), tmp_path_factory.mktemp("downloads")
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        browser.downloads = downloads
        yield browser


@pytest.fixture
def page(chromium, tmp_path):
    """A new rater before the first pair, and the hands and eyes that the tests need."""
    from selenium.webdriver.support.wait import WebDriverWait
    pairs, js = write_study(tmp_path / "study.html"), chromium.execute_script
    keys = dict(left="\ue012", right="\ue014", down="\ue015", space=" ", back="\ue003", u="u")
    wait = WebDriverWait(chromium, 10, 0.02).until

    def click(*ids):
        for name in ids:
            chromium.find_element("id", name).click()

    def press(*names):
        for name in names:
            chromium.switch_to.active_element.send_keys(keys[name])

    def texts(css):
        return js("return [...document.querySelectorAll(arguments[0])]"
                  ".filter(x => x.checkVisibility()).map(x => x.innerText)", css)

    def now():
        """(progress, pair, question, the system on the left) as seen; at the end progress alone."""
        [count], prompt, question = texts("#progress"), texts("#prompt"), texts("[aria-current]")
        if not prompt:
            return count
        pair = pairs[prompt[0].split("\n")[1]]
        sources = js("return [...document.querySelectorAll('.pictures img')].map(x => x.src)")
        assert set(sources) == {pair["a"], pair["b"]} and len(question) == 1
        asked = next(key for key, text in QUESTIONS.items() if text == question[0])
        return count, pair["key"], asked, "a" if sources[0] == pair["a"] else "b"

    def save():
        """The votes in the file that Save writes: [(pair, question, left, answer)]."""
        for old in chromium.downloads.iterdir():
            old.unlink()
        click("save")
        path, = wait(lambda _: [x for x in chromium.downloads.glob("*.json") if x.stat().st_size])
        file = json.loads(path.read_text())
        assert path.name == f"votes-0badcafe-{file['rater']}.json" and VOTES.items() <= file.items()
        return [(v["pair"], v["question"], v["left"], v["answer"]) for v in file["votes"]]

    def results(*contents):
        """Open vote files 0.json, 1.json ... in the results view; a line each."""
        for k, content in enumerate(contents):
            text = content if isinstance(content, str) else json.dumps(VOTES | content)
            (tmp_path / f"{k}.json").write_text(text)
        click("toresults", "reveal")
        paths = [str(tmp_path / f"{k}.json") for k in range(len(contents))]
        chromium.find_element("id", "files").send_keys("\n".join(paths))
        wait(lambda _: len(texts("#log li")) == len(paths))
        return texts("#log li")

    chromium.get((tmp_path / "study.html").as_uri())
    js("newRater(); home()")                  # file:// pages share one storage
    click("go")
    return SimpleNamespace(js=js, click=click, press=press, texts=texts, now=now, save=save,
                           results=results)


@pytest.mark.parametrize("how, hands, undo", [
    ("press", ["left", "down", "right", "space", "right"], ["u", "back"]),
    ("click", ["left", "draw", "rightpic", "leftpic", "right"], ["undo", "undo"])])
def test_study_votes_by_keys_and_by_clicks(page, how, hands, undo):
    """Every answer is saved as what was on that side; undo takes back any number of them."""
    act, seen, votes = getattr(page, how), [], []
    for k in range(12):
        seen.append(page.now())
        count, pair, question, left = seen[-1]
        assert count == f"{k} of 12"
        act(hands[k % 5])
        sides = {"left": left, "right": "ab"[left == "a"]}
        votes.append((pair, question, left, sides.get(hands[k % 5].removesuffix("pic"), "draw")))
    assert page.now() == "12 of 12" and page.save() == votes and len(set(votes)) == 12
    for k in range(11, 3, -1):
        act(undo[k % 2])
        assert page.now() == seen[k]
    act("right")
    page.press("space")                       # a draw after a click too: no button kept the focus
    assert page.save()[:4] == votes[:4] and [v[3] for v in page.save()[5:]] == ["draw"]


def test_study_survives_a_reload_and_a_browser_without_storage(page, chromium):
    page.press("left", "right", "down")
    plan = "return plan.map(step => step.pair.key + step.left)"
    before = page.now(), page.js(plan)
    chromium.refresh()
    assert (page.now(), page.js(plan)) == before and len(page.save()) == 3
    page.click("fresh")                       # the next rater
    chromium.switch_to.alert.accept()
    page.click("go")
    assert page.now()[0] == "0 of 12" and page.js(plan) != before[1]
    page.press("left")
    off = {"source": "Object.defineProperty(window, 'localStorage', {get() {throw Error('off')}})"}
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", off)
    chromium.refresh()
    chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    page.click("go")
    page.press("left", "right")
    assert page.now()[0] == "2 of 12" and len(page.save()) == 2


def test_study_sides_are_balanced_and_random(page):
    plans = page.js("return Array.from({length: 200}, (_, seed) => makePlan(seed)"
                    ".filter((_, i) => i % 2 == 0).map(step => step.pair.key + step.left))")
    for plan in plans:
        assert len({p[:2] for p in plan}) == 6 and sum(p[2] == "a" for p in plan) == 3
    assert len({"".join(p[2] for p in plan) for plan in plans}) == 20       # 6 choose 3: no pattern
    for k in range(6):                        # each pair comes on either side, at any place
        assert 70 < sum(f"p{k}a" in plan for plan in plans) < 130
        assert {i for plan in plans for i in range(6) if plan[i][:2] == f"p{k}"} == set(range(6))


def test_study_voting_is_blind_and_offline_and_fits_a_phone(page, chromium):
    """But for the pictures, the page is the same whichever system is on the left."""
    for width, height in ((1000, 800), (360, 640)):
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
            width=width, height=height, deviceScaleFactor=1, mobile=width == 360))
        shells, sides = set(), set()
        while page.now() != "12 of 12":
            page.press("left")
            sides.add(page.now()[3])
            html = page.js("return document.title + document.body.outerHTML")
            html = re.sub("<script.*?</script>", "", html, flags=re.S)
            assert "zebra" not in html and "yak" not in html
            shells.add(re.sub(r' src="[^"]*"|prompt \d[^<]*|value="\d+"|\d+ of 12', "", html))
            boxes = page.js("return [...document.querySelectorAll('#vote button, #undo, #save')]"
                            ".map(x => x.getBoundingClientRect())")
            assert all(0 <= b["x"] < b["right"] <= width and b["bottom"] <= height for b in boxes)
            assert page.js("return document.documentElement.scrollWidth") <= width
            page.press("left")
        assert len(shells) == 1 and sides == {"a", "b"}
        page.click("toresults", "reveal", "mine")
        assert page.texts("body")[0].count("zebra") > 12
        assert page.js("return document.documentElement.scrollWidth") <= width
        page.click("tovote")                  # and the results leave no name behind
        page.press(*["u"] * 12)
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    log = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    sent = [e["params"] for e in log if e["method"] == "Network.requestWillBeSent"]
    assert sent and all(e["request"]["url"].startswith(("file:", "data:", "blob:")) for e in sent)


def vote(pair="p0", question="looks", answer="a"):
    return {"pair": pair, "question": question, "answer": answer, "left": "a"}


def test_study_results_by_hand(page):
    """looks: 4 wins, 1 draw, 1 loss; of three raters two agree on p0, and two on p1: 2 of 6."""
    one = {"rater": "<b id=evil>", "votes": [vote(), vote("p1"), vote("p0", "fits", "draw")]}
    two = {"rater": "two", "votes": [vote(), vote("p1", answer="b")]}
    three = {"rater": "three", "votes": [vote("p1"), vote(answer="draw")]}
    assert page.results(one, two, three)[0] == "0.json: 3 answers by <b id=evil>"
    assert not page.texts("#evil")            # text stays text
    assert [re.sub(r"\s+", " ", cell) for cell in page.texts("tbody tr")] == [
        "zebra wins 66.7 % 30.0 to 90.3 0.0 % 0.0 to 79.3",
        "draw 16.7 % 3.0 to 56.4 100.0 % 20.7 to 100.0",
        "zebra loses 16.7 % 3.0 to 56.4 0.0 % 0.0 to 79.3",
        "answers 6 1", "raters 3 1", "agreement of raters 33.3 % -"]
    pairs = page.texts(".pair")
    assert "prompt 0 <i>" in pairs[0] and "better? zebra 2 · draw 1 · yak 0" in pairs[0]
    assert "better? zebra 2 · draw 0 · yak 1" in pairs[1] and len(pairs) == 6


def test_study_refuses_other_files_with_a_line(page):
    good = {"rater": "good", "votes": [vote()]}
    bad = {"is not JSON": "{", "is not a votes file": "null", "a votes file: not": {"format": "x"},
           "is too large": " " * 2_100_000,
           "of version 2": {"version": 2}, 'another study, "12345678"': {"study": "12345678"},
           "names no rater": {"rater": ""}, "holds no votes": {"votes": []},
           "a pair this study has not: undefined": {"votes": [None]},
           "a pair this study has not: {": {"votes": [vote({"toString": 1})]},
           "a question this study has not": {"votes": [vote("p0", "colour")]},
           "an unknown answer": {"votes": [vote(answer="c")]}, "twice": {"votes": [vote(), vote()]},
           "is by good, who is already here": {}}
    contents = [what if isinstance(what, str) else good | what for what in bad.values()]
    lines = page.results(good, *contents)
    for k, (line, why) in enumerate(zip(lines[1:], bad), 1):
        assert line.startswith(f"{k}.json ") and why in line and line.endswith(": not counted")
    assert page.texts("tbody tr")[3].split() == ["answers", "1", "0"]


def test_study_template_without_a_study_says_so(chromium):
    chromium.get((HERE / "assets/study.html").as_uri())
    assert "holds no study" in chromium.find_element("tag name", "body").text
