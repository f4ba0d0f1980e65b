"""The measure of *minimal*: tokens, lengths of functions and lines.  Tokens are names, operators and numbers; comments,
docstrings and strings cost nothing, so that nobody is tempted to save on them."""
import ast
import io
import tokenize

import pytest

from conftest import ROOT

LIMIT = 60_000              # of all together
LIMITS = {                  # of each, in reading order
    "losses.py": 2_500, "data.py": 15_000, "model.py": 11_500, "train.py": 7_500, "eval_zeroshot.py": 3_000,
    "eval_linear.py": 2_000, "finetune.py": 4_500, "dense.py": 16_500,
}
LONGEST = {"train": 80}     # lines of the one function that may be longer than the others
LINES = 60


def tokens_of(file: str) -> int:
    counted = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
    return sum(token.type in counted for token in tokenize.generate_tokens(io.StringIO((ROOT / file).read_text()).readline))


def test_all_files_have_a_limit():
    assert sorted(LIMITS) == sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("file, limit", LIMITS.items())
def test_a_file_is_read_in_one_sitting(file, limit):
    assert tokens_of(file) <= limit


def test_all_files_together():
    assert sum(map(tokens_of, LIMITS)) <= LIMIT


@pytest.mark.parametrize("file", LIMITS)
def test_functions_are_short(file):
    tree = ast.parse((ROOT / file).read_text())
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert {name: n for name, n in lines.items() if n > (LONGEST.get(name, LINES) if file == "train.py" else LINES)} == {}


@pytest.mark.parametrize("file", [*LIMITS, *sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py"))])
def test_lines_are_short(file):
    lines = (ROOT / file).read_text().splitlines()
    assert [f"{file}:{i}" for i, line in enumerate(lines, start=1) if len(line) > 120] == []
