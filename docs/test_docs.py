"""
test_docs.py: what stands beside the code does what it says: the README's commands, the shipped
models, the class kit, the emoji. `python -m pytest` runs this file after test_gentron.py.
"""

import ast
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data as D
import gentron as G
import sample
import train
from test_gentron import (
    HERE,
    RED,
    SCRIPTS,
    TINY,
    benched,
    here,
    one,
    pictures,
    random_state,
    refused,
    run,
    sampler_of,
    slow,
    tiny_files,
)

__all__ = ["here", "tiny_files"]                            # fixtures
DOCS = HERE / "docs"

# ---- The README ----------------------------------------------------------------------------------

def test_every_printed_command_has_flags_that_exist_and_sampling_ones_run(here):
    """Of the README and the docstrings; a tiny model stands wherever one names a checkpoint."""
    commands = []
    for name in ("README.md", "train.py", "sample.py", "data.py"):
        text = (HERE / name).read_text("utf-8")
        text = text if name == "README.md" else ast.get_docstring(ast.parse(text))
        commands += [(script, shlex.split(rest, comments=True)) for script, rest in re.findall(
            r"(?:python|torchrun \S+) (train|sample|data)\.py([^`\n&|]*)",
            text.replace("\\\n", " "))]
    assert {script for script, _ in commands} == SCRIPTS.keys()
    words = {w for _, flags in commands for flag in flags for w in G.split_words(flag)}
    state = random_state("t2v", words=sorted({*D.vocabulary(), *words}))
    for script, flags in commands:
        if script != "sample":
            SCRIPTS[script].parser().parse_args(flags)
            continue
        for flag, value in [("--ckpt", "runs/a/ema.safetensors"), *zip(flags, flags[1:])]:
            os.makedirs(Path(value).parent, exist_ok=True)
            if value.endswith(".safetensors"):
                G.save_checkpoint(value, state)
            elif flag in ("--init-image", "--mask", "--first-frame"):
                one(0, (32, 32)).save(value)
            elif flag == "--prompts":
                Path(value).write_text("a red circle\na blue star\n")
        few = ["--n", "1"] if {"--bench", "--compare"} & {*flags} else []
        run(sample, *flags, "--steps", "2", *few)
        shutil.rmtree("samples", ignore_errors=True)

@slow
@pytest.mark.parametrize("kind,asked", [("captions", "noise number n7"), ("classes", "pug"),
                                        ("bare", "")])
def test_a_folder_of_ones_own_pictures_from_autoencoder_to_sample(here, kind, asked):
    """The README's three commands: captions beside the pictures, class folders, or none."""
    pictures("mine", 60, classes=("corgi", "pug") if kind == "classes" else ())
    [path.unlink() for path in Path("mine").glob("*.txt") if kind == "bare"]
    Path("mine/broken.png").write_text("no picture")
    labels = ["--text", "labels", "--conditioning", "adaln"] if kind == "classes" else []
    data = ["--data", "mine", "--batch-size", "8", "--workers", "1", "--size", "32x48"]
    run(train, "--stage", "vae", *data, "--steps", "3")
    said = run(train, *TINY, *data, *labels, "--steps", "3", "--vae", "runs/vae/ema.safetensors")
    assert "60 pictures" in said and "broken.png" in said and "held out" in said
    assert "runs/t2i/ema.safetensors" in run(sample, asked, "--steps", "2")
    assert "nano.safetensors" in run(sample, "a red star", "--frames", "2", "--steps", "2")
    kind == "bare" or refused(sample, ["poodle"], "vocabulary")

def test_every_choice_of_ours_is_in_the_table():
    """Of RESULTS.md, section 11: its column "where" names the functions that hold a tag."""
    table = (DOCS / "RESULTS.md").read_text("utf-8").split("## 11.")[1]
    rows = re.findall(r"\| ([^|]*) \|$", table, re.M)
    listed = {(place.split(" ")[0], name) for row in rows[1:]
              for place in row.replace("\\", "").split("; ")
              for name in place.split(" ", 1)[1].split(", ")}
    found = set()
    for file in ("gentron.py", "data.py", "train.py", "sample.py", "docs/emoji.py"):
        source = (HERE / file).read_text("utf-8")
        for number in (i for i, line in enumerate(source.splitlines(), 1) if "OURS:" in line):
            body, name = ast.parse(source).body, []
            while node := next((n for n in body if n.end_lineno >= number), None):
                body = getattr(node, "body", [])
                if body and node.lineno <= number and hasattr(node, "name"):
                    name.append(node.name)
                elif not name:          # above an assignment, or in the docstring of the module
                    name = [node.targets[0].id if isinstance(node, ast.Assign) else "docstring"]
            found.add((file, ".".join(name)))
    assert listed == found and len(found) > 20

# ---- The shipped models --------------------------------------------------------------------------

NANO, EMOJI = (HERE / f"assets/{x}.safetensors" for x in ("nano", "emoji"))
# Shares that must be right: of 20 prompts a category (10 of clips), with room for so few; and, of
# 60 true pictures after the autoencoder, each category's ceiling
FLOORS = {"color": 0.85, "shape": 0.9, "spatial": 0.85, "texture": 0.75, "non-spatial": 0.45,
          "complex": 0.7, "numeracy": 0.6, "motion": 0.9, "identity": 0.8}
CEILINGS = {"vae": {"shape": 0.95, "spatial": 0.95, "texture": 0.85, "numeracy": 0.85},
            "vae-fine": {"texture": 0.95, "numeracy": 0.95, "complex": 0.95, "non-spatial": 0.84}}
GOLDEN = [RED, "a green star", "a blue ring", "a yellow triangle"]
needs_nano = pytest.mark.skipif(not NANO.exists(), reason="no assets/nano.safetensors here")

@needs_nano
@pytest.mark.parametrize("file,prompts", [(NANO, GOLDEN), (EMOJI, [
    "woman teacher, light skin tone", "spiral shell", "hot beverage", "rabbit face"])])
def test_the_shipped_models_draw_what_they_drew(file, prompts):
    """New model: Image.fromarray(np.concatenate(pictures)).save("assets/golden-NAME.png")."""
    pictures = sampler_of("--steps", 25, ckpt=str(file))(prompts, range(4))[:, 0]
    golden = np.asarray(Image.open(HERE / f"assets/golden-{file.stem}.png"))
    # (another CPU may round otherwise)
    assert np.percentile(abs(np.concatenate(pictures).astype(int) - golden), 99) <= 2
    assert file != NANO or all(D.judge(*pair) for pair in zip(pictures, prompts))

@needs_nano
@pytest.mark.parametrize("category", [c if c not in D.CLIP_CATEGORIES else pytest.param(
    c, marks=slow) for c in FLOORS])
def test_the_shipped_model_scores_above_its_floor(tmp_path, monkeypatch, category):
    monkeypatch.chdir(tmp_path)
    clips = ["--frames", "8", "--n", "10"] if category in D.CLIP_CATEGORIES else ["--n", "20"]
    record, _ = benched("--steps", "25", "--category", category, *clips, ckpt=NANO)
    assert record["categories"][category]["score"] >= FLOORS[category]

@needs_nano
@pytest.mark.parametrize("name", CEILINGS)
def test_the_shipped_autoencoders_keep_what_the_judge_reads(name):
    vae = G.build_vae(G.load_checkpoint(HERE / f"assets/{name}.safetensors"))
    for category, ceiling in CEILINGS[name].items():
        captions = D.prompts(category, 60)
        z = vae.encode(G.to_float(np.stack([D.truth(caption, 99) for caption in captions])))
        right = [bool(D.judge(*pair)) for pair in zip(G.to_uint8(vae.decode(z)), captions)]
        assert np.mean(right) >= ceiling, f"{category}: {np.mean(right):.2f}"
        assert z.mean().abs() < 0.3 and 0.5 < z.std() < 1.3     # (the means, not drawn)
    assert sum(p.stat().st_size for p in (HERE / "assets").glob("*.safetensors")) < 45e6

# ---- docs/ ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("solved", [(), (1, 2, 3, 4, 5, 6, 7), *(
    pytest.param((k,), marks=slow) for k in range(1, 8))])
def test_the_class_kit_has_seven_holes_and_the_project_fills_each(tmp_path, monkeypatch, solved):
    subprocess.run([sys.executable, DOCS / "assignment.py", tmp_path / "kit"], check=True)
    monkeypatch.syspath_prepend(DOCS)
    punch = importlib.import_module("assignment").punch
    for name in ("gentron.py", "train.py") if solved else ():
        source = (HERE / name).read_text("utf-8")
        source = source if len(solved) > 1 else punch(source, solved[0])
        (tmp_path / "kit" / name).write_text(source, "utf-8")
    grade = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path / "kit", text=True,
                           capture_output=True).stdout
    assert f"score: {len(solved)} of 7 exercises" in grade, grade
    assert len(solved) != 1 or not re.search(rf"FAILED .*exercise_{solved[0]}\b", grade)
    assert "<details>" not in (tmp_path / "kit/EXERCISES.md").read_text("utf-8")

@pytest.mark.parametrize("hostile", [None, "../x.webp", "/tmp/x.webp", "link"])
def test_emoji_have_names_one_skin_tone_held_out_and_no_hostile_archive(tmp_path, hostile):
    cook = [f"1f468{tone}-200d-1f373" for tone in ("", *(f"-{0x1f3fb + k:x}" for k in range(5)))]
    names = {"☕": dict(name="cup", group="Food"), "🇫🇷": dict(name="France", group="Flags"),
             "👨\u200d🍳": dict(name="man cook", group="People")}
    one((20, 90, 200, 255), (8, 8), "RGBA").save(file := io.BytesIO(), "WEBP")
    files = {f"assets/{code}.webp": file.getvalue() for code in ("2615", "1f1eb-1f1f7", *cook)}
    files |= {hostile: b"xxx"} if hostile else {}
    for archive, members in (("a.tgz", files), ("b.tgz", {
            "data-by-emoji.json": json.dumps(names).encode()})):
        with tarfile.open(tmp_path / archive, "w:gz") as tar:
            for name, data in members.items():
                outside = name == hostile != "link"
                member = tarfile.TarInfo(name if outside else f"package/{name}")
                member.size, member.linkname = len(data), "/etc/passwd"
                member.type = tarfile.SYMTYPE if name == "link" else tarfile.REGTYPE
                tar.addfile(member, io.BytesIO(data))
    done = subprocess.run([sys.executable, DOCS / "emoji.py", "e", "a.tgz", "b.tgz"],
                          cwd=tmp_path, text=True, capture_output=True)
    assert (len(os.listdir(tmp_path)) == 2) == (done.returncode == 2) == bool(hostile)
    if not hostile:
        train, held = (D.Folder(tmp_path / name).captions for name in ("e", "e-heldout"))
        assert {"cup", "man cook"} < {*train} and "France" not in train and len(train) == 6
        assert len(held) == 1 and held[0] not in train and "skin tone" in held[0]

def test_retrieval_finds_a_picture_among_all(here, monkeypatch):
    """True pictures in place of drawn ones are all first; those of other names are not."""
    pictures("mine", 24), pictures("held", 12)
    run(train, *TINY, "--data", "mine", "--steps", "1", "--vae", "vae.safetensors")
    monkeypatch.syspath_prepend(DOCS)
    retrieval = importlib.import_module("retrieval")
    true = {f"noise number n{k}": D.Folder("mine", (32, 32))[k][0] for k in range(24)}
    for right in (True, False):
        names = list(true) if right else list(true)[::-1]
        monkeypatch.setattr(sample.Sampler, "__call__", lambda self, prompts, *_: np.stack(
            [true[names[list(true).index(prompt)]] for prompt in prompts]))
        said = run(retrieval, "runs/t2i/ema.safetensors", "mine", "held", "--row", "row.png")
        assert re.findall(r"first: +([\d.]+)%", said) == ["100.0" if right else "0.0"] * 2
    assert "n = 23" in said and "n = 12" in said            # one of 24 was kept out of training
    assert Image.open("row.png").width > 8 * 64

@slow
def test_people_vote_in_a_browser_and_each_vote_is_what_was_on_that_side(here):
    """Keys: left, right, down for a draw. The file that Save writes tells what stood left."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    pictures("ours", 3), pictures("theirs", 3)
    run(sample, "--compare", "ours", "theirs", "--out", "study.html")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(here / "saved")})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        browser.get((here / "study.html").as_uri())
        browser.find_element("id", "go").click()
        count = lambda: browser.find_element("id", "progress").text
        n = int(count().split(" of ")[1])
        for k in range(n):
            assert count() == f"{k} of {n}"
            browser.switch_to.active_element.send_keys("\ue012\ue014\ue015"[k % 3])
        browser.find_element("id", "save").click()
        for _ in range(100):
            files = list((here / "saved").glob("votes-*.json")) if Path("saved").exists() else []
            if files and files[0].stat().st_size:
                break
            time.sleep(0.1)
    votes = json.loads(files[0].read_text())["votes"]
    assert len(votes) == n >= 3 and {vote["left"] for vote in votes} <= {"a", "b"}
    assert [vote["answer"] for vote in votes] == [
        (vote["left"], "ab"[vote["left"] == "a"], "draw")[k % 3] for k, vote in enumerate(votes)]
