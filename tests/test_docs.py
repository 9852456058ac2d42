"""README.md and docs/ against what they tell of: commands parse, flags exist, links and files are there."""

import importlib
import re
import shlex
import shutil

import pytest
from conftest import ROOT, run_script

import reproduce

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
COMMAND = re.compile(r"(?:^|`)(?:python3|\S+/python) (\w+\.py\b[^`\n&#]*)", re.MULTILINE)
COMMANDS = sorted({command.strip() for text in TEXTS.values() for command in COMMAND.findall(text)})
RESULTS = [command for command in COMMANDS if "--page" in command]
OTHERS = {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv_id", "--rdzv_backend", "--rdzv_endpoint", "--max",
          "--nodes", "--ntasks", "--gpus", "--cpus", "--requeue", "--open", "--kill", "--signal", "--dist"}


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines() if line.startswith("#")}


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_s_flags_are_taken(tmp_path, monkeypatch, command):
    (tmp_path / "data/sample_precomp/images").mkdir(parents=True)  # --images must be a folder
    monkeypatch.chdir(tmp_path)
    script, *flags = shlex.split(command)
    parse_args = importlib.import_module(script.removesuffix(".py")).parse_args
    if flags == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            parse_args(flags)
    else:
        parse_args(flags)


@pytest.mark.parametrize("page", TEXTS)
def test_flags_named_in_text_exist(page):
    known = {flag for script in ROOT.glob("*.py")
             for flag in re.findall(r'add_argument\("(--\w+)"', script.read_text(encoding="utf-8"))} | {"--help"}
    assert set(re.findall(r"(?<![\w-])--\w+", TEXTS[page])) <= known | OTHERS


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_s_table_has_the_files_that_are_there():
    table = TEXTS["README.md"].split("## What is where")[1].split("\n## ")[0]
    cells = re.findall(r"^\|[a-z ]*\| (`.*?) \|", table, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]
    assert len(names) > 20 and [name for name in names if not (ROOT / name).exists()] == []
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", table))


@pytest.mark.parametrize("command", RESULTS)
def test_results_in_a_page_are_what_their_command_makes_of_their_record(tmp_path, command):
    flags = shlex.split(command)[1:]
    opt = reproduce.parse_args(flags)
    page = tmp_path / opt.page
    page.parent.mkdir(parents=True)
    start, end = f"<!-- {opt.preset} -->\n", f"<!-- /{opt.preset} -->\n"
    before, after = TEXTS[opt.page].partition(start)[0], TEXTS[opt.page].partition(end)[2]
    page.write_text(before + start + end + after, encoding="utf-8")
    shutil.copytree(ROOT / opt.record, tmp_path / "output")
    done = run_script("reproduce.py", *flags, "--output", "output", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert page.read_text(encoding="utf-8") == TEXTS[opt.page]
    for name in ("results", "epochs"):
        assert (tmp_path / "docs" / f"{opt.preset}_{name}.png").exists()
        assert (ROOT / "docs" / f"{opt.preset}_{name}.png").stat().st_size < 100_000
