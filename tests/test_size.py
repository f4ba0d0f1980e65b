"""The measure of *minimal*: tokens, lengths of functions and lines.  Tokens are names, operators and numbers; comments,
docstrings and strings cost nothing, so that nobody is tempted to save on them."""
import ast
import tokenize

import pytest

from conftest import ROOT

LIMIT = 72_740              # of all together
LIMITS = {                  # of each, in reading order
    "losses.py": 2_350, "model.py": 13_850, "train.py": 11_600, "data.py": 19_180, "eval_zeroshot.py": 3_600,
    "eval_linear.py": 1_750, "finetune.py": 3_850, "dense.py": 16_670,
}
COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER)
LINES, LINES_OF_TRAIN = 60, 80      # of a function, and of the one that may be longer, train.train


def tokens_of(file: str) -> int:
    with open(ROOT / file, encoding="utf-8") as source:
        return sum(token.type in COUNTED for token in tokenize.generate_tokens(source.readline))


def test_all_files_have_a_limit():
    assert sorted(LIMITS) == sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("file, limit", LIMITS.items())
def test_a_file_is_read_in_one_sitting(file, limit):
    assert tokens_of(file) <= limit


def test_all_files_together():
    assert sum(map(tokens_of, LIMITS)) <= LIMIT


@pytest.mark.parametrize("file", LIMITS)
def test_functions_are_short(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.FunctionDef):
            most = LINES_OF_TRAIN if (file, node.name) == ("train.py", "train") else LINES
            assert node.end_lineno - node.lineno < most, f"{file}: {node.name}"


@pytest.mark.parametrize("file", sorted(str(path.relative_to(ROOT)) for path in
                                        [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]))
def test_lines_are_short(file):
    lines = (ROOT / file).read_text().splitlines()
    assert [i for i, line in enumerate(lines, start=1) if len(line) > 120] == []
