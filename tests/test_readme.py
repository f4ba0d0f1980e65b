"""What README and docs say is so: names, options and files they point to exist, line counts are those of the files."""
import contextlib
import importlib
import io
import re
import sys

import pytest

from conftest import ROOT

import data
import dense
import train

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# of other programs that the pages call: pytest, pip, torchrun, Slurm, img2dataset
THEIR_OPTIONS = {"all", "durations", "no-deps", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id",
                 "max-restarts", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal",
                 "requeue", "image_size", "resize_mode", "url_list", "input_format", "url_col", "caption_col",
                 "output_format", "output_folder", "thread_count", "incremental_mode", "retries"}


def find(module: str, name: str):
    thing = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)                # raises, and so names, what is missing
    return thing


@pytest.mark.parametrize("page", PAGES)
def test_every_name_a_page_points_to_exists(page):
    named = re.findall(rf"`({'|'.join(SCRIPTS)})\.([A-Za-z_][A-Za-z_0-9.]*)", PAGES[page])
    named = [(module, name) for module, name in named if name != "py"]
    assert page != "README.md" or len(named) > 25, "the map from the paper to the code is gone"
    for module, name in named:
        find(module, name)


@pytest.mark.parametrize("page, first, last, least", [
    ("README.md", "About an hour of reading", "Within a file each letter", 6),
    ("README.md", "## From the paper to the code", "## Where the paper is silent", 3),
    ("COMPARED.md", "# The systems", "The numbers are of", 1),
])
def test_every_name_without_its_module_exists(page, first, last, least):
    """Also of a class's method; any other word in backticks there is a method or preset that --help knows."""
    text = PAGES[page][PAGES[page].index(first):PAGES[page].index(last)]
    modules = [importlib.import_module(module) for module in SCRIPTS]
    names = [name for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", text)
             if not name.endswith(".py") and name.split(".")[0] not in [*SCRIPTS, *train.METHODS, *train.PRESETS]]
    assert len(names) >= least
    for name in names:
        owners = [module for module in modules if hasattr(module, name.split(".")[0])]
        assert owners, name
        find(owners[0].__name__, name)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_a_page_points_to_exists(page):
    here = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (here / link).is_file(), link
    for file in re.findall(r"(?<![\w/.])((?:docs/|tests/)?[a-z_]+\.py|docs/[\w.]+|requirements[\w-]*\.txt|\.ci/run)\b",
                           PAGES[page]):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("module", SCRIPTS)
def test_line_counts(module):
    lines = len((ROOT / f"{module}.py").read_text().splitlines())
    said = re.search(rf"`{module}\.py` \| (\d+) \|", README)
    assert said, f"README's table of files leaves out {module}.py"
    assert abs(int(said[1]) - lines) <= 0.1 * lines, f"{module}.py has {lines} lines, README says {said[1]}"


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 180


def help_of(command: str) -> str:
    """What "train.py" or "dense.py words" says to --help, asked in this process, without line breaks in sentences."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", [*command.split(), "--help"])
        patch.setenv("COLUMNS", "9999")
        importlib.import_module(command.partition(".")[0]).main()
    return shown.getvalue()


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Each command's --help."""
    commands = [f"{script}.py" for script in SCRIPTS if script not in ("losses", "dense")]
    return {command: help_of(command) for command in commands + [f"dense.py {name}" for name in dense.COMMANDS]}


def test_every_option_the_pages_name_is_one_of_a_script(helps):
    known = set(re.findall(r"--([a-z][a-z0-9-]*)", "".join(helps.values()))) | THEIR_OPTIONS
    for page, text in PAGES.items():
        for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", text):
            assert option in known, f"{page}: --{option}"


def test_every_command_the_pages_show_takes_its_options(helps):
    """In a line as `python dense.py words CHECKPOINT --image FILE`, each option is one of that command's."""
    seen = 0
    for page, text in PAGES.items():
        text = text.replace("\\\n", " ").replace("\\|", "|")
        for command, rest in re.findall(r"(?:python|torchrun|srun)[^`\n#]*?\b([a-z_]+\.py)([^`\n#]*)", text):
            if command == "dense.py":
                command = " ".join([command, *rest.split()[:1]])
            if command in helps:
                for option in re.findall(r"--([a-z][a-z0-9-]*)", rest.split("   ")[0]):
                    seen += 1
                    assert f"--{option}" in helps[command], f"{page}: {command} has no --{option}"
    assert seen > 30


def test_help_has_no_empty_defaults_and_names_every_data_set(helps):
    for command, text in helps.items():
        assert "usage" in text and "(default: )" not in text, command
    for kind in data.FORMATS:
        for command in ("data.py", "eval_zeroshot.py"):
            assert kind in helps[command], f"{command}: {kind}"
        assert kind in README and f"`{kind}" in PAGES["DATA.md"], kind


def test_help_of_dense_names_its_commands():
    shown = help_of("dense.py")
    assert all(command in shown for command in dense.COMMANDS)
