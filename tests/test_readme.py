"""What README says is so: the names it points to exist, its line counts are those of the files, its commands parse."""
import importlib
import re

import pytest

from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def test_every_name_readme_points_to_exists():
    named = re.findall(rf"`({'|'.join(SCRIPTS)})\.([A-Za-z_][A-Za-z_0-9.]*)`", README)
    named = [(module, name) for module, name in named if name != "py"]
    assert len(named) > 25, "the map from the paper to the code is gone"
    for module, name in named:
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)            # raises, and so names, what is missing


@pytest.mark.parametrize("module", SCRIPTS)
def test_line_counts(module):
    lines = len((ROOT / f"{module}.py").read_text().splitlines())
    said = re.search(rf"`{module}\.py` \| (\d+) \|", README)
    assert said, f"README's table of files leaves out {module}.py"
    assert abs(int(said[1]) - lines) <= 0.1 * lines, f"{module}.py has {lines} lines, README says {said[1]}"


def test_every_option_readme_names_exists():
    known = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for option in set(re.findall(r"`--(no-)?([a-z][a-z-]*)", README)):
        assert re.search(rf"\b{option[1].replace('-', '_')}\b|--{option[1]}", known), option


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "losses"])
def test_help(script):
    assert "usage" in run_script(f"{script}.py", "--help").stdout
