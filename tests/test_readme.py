"""What README and docs say is so: names, options and files they point to exist, line counts are those of the files."""
import importlib
import re
import subprocess
import sys

import pytest

from conftest import ROOT, finish_script, start_script

import train

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# of other programs that the pages call
THEIR_OPTIONS = {"image_size", "resize_mode", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id",
                 "durations", "url_list", "input_format", "url_col", "caption_col", "output_format", "output_folder",
                 "thread_count", "incremental_mode", "retries", "nodes", "ntasks-per-node",
                 "gpus-per-node", "cpus-per-task", "time", "signal", "requeue", "max-restarts", "no-deps"}


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


@pytest.mark.parametrize("first, last, least", [
    ("About an hour of reading", "Within a file each letter", 12),
    ("## From the paper to the code", "## The systems it is compared with", 2),
    ("## The systems it is compared with", "## Where the paper is silent", 1),
])
def test_every_name_without_its_module_exists(first, last, least):
    """Also of a class's method; any other word in backticks there is a method or preset that --help knows."""
    text = README[README.index(first):README.index(last)]
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
    assert len(README.splitlines()) <= 345


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Each command's --help; a command is "train.py" or "dense.py words"."""
    commands = [f"{script}.py" for script in SCRIPTS if script not in ("losses", "dense", "data")]
    commands += [f"dense.py {name}" for name in ("zeroshot", "words", "upernet", "maskrcnn")]
    commands += [f"data.py {name}" for name in ("preview", "check", "bpe")]
    running = {command: start_script(*command.split(), "--help") for command in commands}
    return {command: finish_script(process).stdout for command, process in running.items()}


@pytest.mark.slow
def test_every_option_the_pages_name_is_one_of_a_script(helps):
    known = set(re.findall(r"--([a-z][a-z0-9-]*)", "".join(helps.values()))) | THEIR_OPTIONS
    for page, text in PAGES.items():
        for option in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", text):
            assert option in known, f"{page}: --{option}"


@pytest.mark.slow
def test_every_command_the_pages_show_takes_its_options(helps):
    """In a line as `python dense.py words CHECKPOINT --image FILE`, each option is one of that command's."""
    seen = 0
    for page, text in PAGES.items():
        text = text.replace("\\\n", " ").replace("\\|", "|")
        for command, rest in re.findall(r"(?:python|torchrun|srun)[^`\n#]*?\b([a-z_]+\.py)([^`\n#]*)", text):
            words = rest.split()
            if command in ("dense.py", "data.py") and words and words[0] in ("zeroshot", "words", "upernet", "maskrcnn",
                                                                             "preview", "check", "bpe"):
                command = f"{command} {words[0]}"
            if command in helps:
                for option in re.findall(r"--([a-z][a-z0-9-]*)", rest.split("   ")[0]):
                    seen += 1
                    assert f"--{option}" in helps[command], f"{page}: {command} has no --{option}"
    assert seen > 30


@pytest.mark.slow
def test_help_has_no_empty_defaults_and_names_every_data_set(helps):
    import data
    for command, text in helps.items():
        assert "usage" in text and "(default: )" not in text, command
    kinds = {spec.partition(":")[0] for specs in data.OPENS.values() for spec in specs.split(", ")}
    for kind in kinds | {"icinw"}:
        assert kind in re.sub(r"-\s+", "-", helps["eval_zeroshot.py"]), kind
        assert kind in README and f"`{kind}" in PAGES["DATA.md"], kind


def test_top_level_help_of_dense():
    done = subprocess.run([sys.executable, "dense.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "maskrcnn" in done.stdout
