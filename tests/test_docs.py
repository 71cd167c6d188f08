"""README and docs/: short, in short sentences, and true to the files, flags and lines that they name."""

import csv
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from steadyrl import family
from steadyrl.arguments import check_args, parse_args

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = re.compile(r"<!-- (\w+): written by .*?<!-- end of \1 -->", re.DOTALL)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NO_PROSE = re.compile(r"[|#<]|!\[")  # a line of a table, a heading, HTML, a picture
BANNED = re.compile(
    r"\b(is made up|by way of|beside|a line says so|what comes of it|one script an algorithm|shall|stays unnoticed|"
    r"is passed over)\b"
)


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def prose(page: Path) -> list[str]:
    """The paragraphs and the items of lists: without code, tables, headings, pictures and what a script has written."""
    text = FENCED.sub("\n", GENERATED.sub("\n", page.read_text()))
    text = "\n".join("" if NO_PROSE.match(line.strip()) else line for line in text.splitlines())
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)  # of a link its text
    return [
        " ".join(part.split()) for part in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE) if part.strip()
    ]


def code(page: Path, *languages: str) -> list[str]:
    """The blocks of code in these languages."""
    return [block for language, block in FENCED.findall(page.read_text()) if language in languages]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 14_000


@each_page
def test_sentences_are_short(page):
    sentences = [sentence for part in prose(page) for sentence in re.split(r"(?<=[.!?])[)\"*]*\s+", part)]
    assert [sentence for sentence in sentences if len(sentence.split()) > 25] == []


@each_page
def test_words_mean_what_others_mean_by_them(page):
    assert BANNED.findall(" ".join(prose(page))) == []


@each_page
def test_lines_are_short(page):
    text = FENCED.sub("", GENERATED.sub("", page.read_text()))
    assert [line for line in text.splitlines() if len(line) > 128 and not line.startswith("|")] == []


@each_page
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", FENCED.sub("", page.read_text()))
    for link in (first or second for first, second in links):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", FENCED.sub("", target.read_text()), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w\- ]", "", one).strip().lower().replace(" ", "-") for one in headings}


@each_page
def test_the_flags_of_commands_are_understood(page):
    """Of each command of a training script, to the end of its line."""
    for line in "".join(code(page, "bash")).splitlines():
        for name, flags in re.findall(r"\bpython (\w+)\.py ([^#&]+)", line):
            if name in family.SCRIPTS:
                args_class = importlib.import_module(name).Args
                check_args(parse_args(args_class, shlex.split(flags), args_class()))
    for name in re.findall(r"python (benchmarks/\w+\.py)", page.read_text()):
        assert (ROOT / name).exists()


@pytest.mark.parametrize(("page", "script"), list(zip(("ddpg", "td3", "sac", "dqn"), family.SCRIPTS, strict=True)))
def test_an_algorithms_page_quotes_its_script(page, script):
    """Each line of Python stands in the script as it does in the page."""
    quoted = [line for block in code(ROOT / "docs" / "algorithms" / f"{page}.md", "python") for line in block.splitlines()]
    lines = {line.strip() for line in (ROOT / f"{script}.py").read_text().splitlines()}
    assert quoted and [line for line in quoted if line.strip() not in lines] == []


def rows_of(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmarks" / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_comparison_of_the_readme_is_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    what = ("num_envs", "fill", "matmul_precision", "compared_with")
    rows = [row for row in rows_of("speed") if row["machine"] == "AMD EPYC, 2 cores"]  # a user's own may follow
    rows = [row for row in rows if [row[name] for name in what] == ["1", "0", "highest", "stable-baselines3"]]
    latest = {(row["script"], row["env_id"], row["side"]): row["rate"] for row in rows}
    for name, script, env_id in (
        ("DDPG", "ddpg_continuous_action", "Hopper-v4"),
        ("SAC", "sac_continuous_action", "Hopper-v4"),
        ("DQN", "dqn", "CartPole-v1"),
    ):
        ours, theirs, jax = (latest[script, env_id, side] for side in ("compile", "stable-baselines3", "sbx"))
        assert f"| {name}, {env_id}, steps a second on two CPU cores | {ours} | {theirs} | {jax} |" in readme
    page = (ROOT / "docs" / "speed.md").read_text()
    for task, env_id, score in (
        ("pendulum", "Pendulum-v1", "-200"),
        ("lunar_lander", "LunarLanderContinuous-v3", "200"),
        ("half_cheetah", "HalfCheetah-v4", "5000"),
    ):
        medians = []
        for side in ("ours", "stable-baselines3", "sbx"):
            runs = [row for row in rows_of("time_to_score") if (row["task"], row["side"]) == (task, side)]
            assert sorted(row["seed"] for row in runs) == ["1", "2", "3"]
            middle = sorted(runs, key=lambda row: float(row["seconds"]))[1]
            above = sum(row["passed"] == "False" or float(row["seconds"]) > float(middle["seconds"]) for row in runs)
            known = middle["passed"] == "True" and above == 1  # a run that did not pass may have needed any time above its own
            medians.append("over " * (not known) + f"{float(middle['seconds']):.0f}")
            assert re.search(rf"\| {env_id} \| {score} \| {side} \|.*\| {medians[-1]} \|\n", page)
        cells = " | ".join(medians)
        assert f"| {env_id}, seconds to a greedy return of {score} (median of three seeds) | {cells} |" in readme
    assert f"| {len((ROOT / 'ddpg_continuous_action.py').read_text().splitlines())}, in one script |" in readme
    killed = rows_of("kill_test")
    same = sum(not row["differs"] for row in killed)
    assert f"| {same} of {len(killed)} runs the same |" in readme


def test_the_figures_of_reliability_are_those_of_the_files():
    page = (ROOT / "docs" / "reliability.md").read_text()
    kinds = {"DDPG": ("ddpg_continuous_action", False), "DDPG, environments with bad habits": ("ddpg_continuous_action", True)}
    kinds |= {"TD3": ("td3_continuous_action", False), "SAC": ("sac_continuous_action", False), "DQN": ("dqn", False)}
    for name, kind in kinds.items():
        rows = [row for row in rows_of("kill_test") if (row["script"], "border_toys" in row["task"]) == kind]
        writing = sum("while writing" in row["killed"] for row in rows)
        assert f"| {name} | {sum(not row['differs'] for row in rows)} of {len(rows)} | {writing} |" in page
    cuts, hit = rows_of("power_cut"), rows_of("chaos")
    assert f"**{sum(not row['differs'] for row in cuts)} of {len(cuts)} power cuts**" in page
    hits = [int(row["hits"]) for row in hit]
    same = sum(not row["differs"] for row in hit)
    words = f"{same} of {len(hit)} disturbed runs ended bit-identical, after {sum(hits)} hits, {min(hits)} to {max(hits)} for"
    assert words in " ".join(page.split())


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "algorithms" / "ddpg.html").exists()
    assert (tmp_path / "site" / "benchmarks" / "results" / "half_cheetah.png").exists()
