"""
assignment.py: the class kit, a copy of this project with seven holes.

    python docs/assignment.py OUT                  # makes the folder OUT
    cd OUT && python -m pytest                     # grades it: "score: 0 of 7 exercises"
    cd OUT && python -m pytest -k exercise_3       # grades one exercise

OUT/EXERCISES.md says what is to be written; the solution is the project. Comments `# exercise N` in
the project's files mark the holes. At the end of a `def` line the comment empties the function (its
docstring stays), at the end of a statement it empties that statement.
"""

import argparse
import ast
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gentron.py", "data.py", "train.py", "sample.py")
ASSETS = ("vae.safetensors", "nano.safetensors", "study.html")
TITLES = {1: "patchify", 2: "q_sample", 3: "the step to s", 4: "guided",
          5: "the motion-free branch", 6: "the EMA update", 7: "the text mask"}
CONFTEST = '''"""Prints the score. An exercise counts if all of its tests pass."""
import re


def pytest_terminal_summary(terminalreporter):
    found = lambda *outcomes: {exercise for outcome in outcomes
                               for report in terminalreporter.stats.get(outcome, ())
                               for exercise in re.findall(r"exercise_\\d+", report.nodeid)}
    right, failed = found("passed"), found("failed", "error")
    terminalreporter.write_line(f"score: {len(right - failed)} of {len(right | failed)} exercises")
'''


def find_holes(source):
    """Python source -> [(first, last, indent, exercise)]: lines[first:last] are to be emptied."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    holes = []
    for number, line in enumerate(source.splitlines(), 1):
        for exercise in map(int, re.findall(r"# exercise (\d+)", line)):
            # The innermost of the statements around this line begins last
            node = max((n for n in statements if n.lineno <= number <= n.end_lineno),
                       key=lambda n: n.lineno)
            first, indent = node.lineno - 1, node.col_offset
            if isinstance(node, ast.FunctionDef):          # begin behind its docstring
                first, indent = node.body[0].end_lineno, node.body[0].col_offset
            holes.append((first, node.end_lineno, indent, exercise))
    return holes


def punch(source, keep=None):
    """Python source -> the same source with its holes. keep: an exercise that stays solved."""
    lines = source.splitlines(keepends=True)
    # From the end, so that the line numbers of the other holes stay true
    for first, last, indent, n in sorted(find_holes(source), reverse=True):
        if n != keep:
            hole = f'raise NotImplementedError("exercise {n}: {TITLES[n]}")\n'
            lines[first:last] = [" " * indent + hole]
    return "".join(lines)


def make(out):
    """Writes the kit into the folder `out` (a Path). ValueError if it holds files already."""
    sources = {name: (ROOT / name).read_text("utf-8") for name in SCRIPTS}
    found = sorted(hole[-1] for source in sources.values() for hole in find_holes(source))
    if found != sorted(TITLES):
        raise ValueError(f"the marked exercises are {found}, not {sorted(TITLES)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files; choose a new or empty folder")
    (out / "assets").mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        shutil.copy(ROOT / "assets" / name, out / "assets")
    for name, source in sources.items():
        (out / name).write_text(punch(source), "utf-8")
    shutil.copy(ROOT / "docs" / "exercises_test.py", out / "test_exercises.py")
    (out / "conftest.py").write_text(CONFTEST, "utf-8")
    sheet = (ROOT / "docs" / "EXERCISES.md").read_text("utf-8")            # without its answers
    (out / "EXERCISES.md").write_text(re.sub(r"\s*<details>.*?</details>", "", sheet, flags=re.S),
                                      "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    try:
        make(parser.parse_args().out)
    except (OSError, ValueError) as error:
        parser.error(str(error))                           # one line, exit code 2
