"""The reproduction's tables, without training: their runs are options of train.py, the page says what was found."""
import json
import shlex

import pytest

import dense
import eval_linear
import eval_zeroshot
import finetune
import reproduce
import train
from train import parse

TABLES = reproduce.tables({})
RUNS = sorted({row.run for table in TABLES.values() for row in table.rows})
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_options_of_train(run):
    options = train.parse_train_options(shlex.split(run))
    assert options.preset == "pocket" and run.startswith(f"--method {options.method} ")


def test_steps_are_those_that_train_takes():
    assert reproduce.steps_of("--method clip --data shapes:train=2000 --epochs 25") == 25 * 31
    assert reproduce.steps_of("--method clip --data shapes:train=2000 --epochs 25 --steps 7") == 7
    assert reproduce.steps_of(reproduce.system("unicl")) == reproduce.steps_of(reproduce.system("clip"))


def test_options_of_all_kinds():
    assert reproduce.setting("maskclip", causal=False, mask_ratio=0.5).endswith("--no-causal --mask-ratio 0.5")
    assert train.parse_train_options(shlex.split(reproduce.setting("maskclip", causal=False))).causal is False


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", reproduce.EVALUATIONS)
def test_an_evaluation_is_options_of_its_script(name, quick):
    script, instead, _ = reproduce.EVALUATIONS[name]
    common = ["--seed", "0", "--device", "cpu", "--out", "x", "--json", "y", *(instead if quick else [])]
    if script[0] == "dense.py":
        kinds = dict(words=lambda a: parse(dense.WordOptions, "", a, ("checkpoint",)), upernet=dense.parse_upernet,
                     zeroshot=lambda a: parse(dense.ZeroShotOptions, "", a, ("checkpoint",)),
                     maskrcnn=dense.parse_maskrcnn)
        options = kinds[script[1]](["last.pt", *script[2:], *common])
    else:
        module = {"eval_zeroshot.py": eval_zeroshot, "eval_linear.py": eval_linear, "finetune.py": finetune}[script[0]]
        options = parse(module.Options, "", ["last.pt", *script[1:], *common], ("checkpoint",))
    assert options.checkpoint == "last.pt" and options.json == "y"


def cell(run, seed, evaluation, seconds=100.0, **values):
    return dict(run=run, seed=seed, evaluation=evaluation, values=values, seconds=seconds, commit="abc")


def cells_of(*cells):
    return {(c["run"], c["seed"], c["evaluation"]): c for c in cells}


def test_equal_seconds_follow_from_the_seconds_of_equal_steps():
    clip, slip = reproduce.system("clip"), reproduce.system("slip")
    rows = reproduce.tables(cells_of(cell(clip, 0, "train", 200.0), cell(slip, 0, "train", 500.0)))["systems"].rows
    late = [row for row in rows if row.group == "equal seconds"]
    assert [row.run for row in late] == [f"{slip} --steps {775 * 2 // 5}"]
    assert reproduce.steps_of(late[0].run) == 310


def test_what_is_missing():
    table = TABLES["beta"]
    everything = reproduce.wanted(table, SEEDS, {})
    assert len(everything) == 3 * len(table.rows) and all(names == ["zeroshot"] for names in everything.values())
    run = table.rows[0].run
    left = reproduce.wanted(table, SEEDS, cells_of(cell(run, 1, "zeroshot", top1=1.0, i2t=2.0, t2i=3.0)))
    assert set(everything) - set(left) == {(run, 1)}
    assert not reproduce.wanted(table, SEEDS, {}, only=("linear",))


def test_a_table_has_its_own_number_of_seeds_where_the_command_gives_none():
    assert {seed for _, seed in reproduce.wanted(TABLES["seeds"], (), {})} == set(range(9))
    assert {seed for _, seed in reproduce.wanted(TABLES["beta"], (), {})} == set(SEEDS)
    assert {seed for _, seed in reproduce.wanted(TABLES["seeds"], (0,), {})} == {0}
    clip, maskclip = (row.run for row in TABLES["seeds"].rows if row.name == "2,000 pairs")
    cells = cells_of(cell(maskclip, 8, "zeroshot", top1=7.0),
                     *(cell(clip, seed, "zeroshot", top1=seed) for seed in range(9)))
    page = reproduce.markdown(TABLES["seeds"], (), cells)
    assert "| 2,000 pairs | clip | 4.0 ± 2.7 |" in page and "| 2,000 pairs | maskclip | 7.0 (1 of 9) |" in page


def test_the_page_holds_mean_spread_and_the_paper(tmp_path, monkeypatch):
    table = TABLES["beta"]
    run = table.rows[2].run
    cells = cells_of(*(cell(run, seed, "zeroshot", top1=50.0 + seed, i2t=10.0, t2i=20.0) for seed in SEEDS),
                     cell(run, 0, "train", 321.0), cell(table.rows[0].run, 0, "zeroshot", top1=9.0, i2t=1.0, t2i=2.0))
    for name in ("CELLS", "PAGE", "PICTURE"):
        monkeypatch.setattr(reproduce, name, tmp_path / getattr(reproduce, name).name)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    reproduce.PAGE.write_text("# Title\n\nWhat was found.\n\n" + reproduce.MARK + "old")
    reproduce.report(SEEDS, cells)
    page = reproduce.PAGE.read_text()
    assert page.startswith("# Title\n\nWhat was found.") and "old" not in page
    assert "| 0.05 | 51.0 ± 1.0 *44.5* | 10.0 ± 0.0 *70.1* | 20.0 ± 0.0 *45.6* | 775 | 321 |" in page
    assert "| 1 | 9.0 (1 of 3) *36.5* |" in page and page.count("\n## ") == 1, "only what was measured"
    assert reproduce.PICTURE.stat().st_size > 1000


def test_cells_are_lines_of_a_file(tmp_path):
    path = tmp_path / "cells.jsonl"
    lab = reproduce.Lab(tmp_path, path, quick=False, jobs=1, only=())
    lab.record(**cell("--method clip", 0, "train"))
    lab.record(**cell("--method clip", 0, "zeroshot", top1=1.0))
    assert len(path.read_text().splitlines()) == 2 and json.loads(path.read_text().splitlines()[0])["commit"]
    assert set(reproduce.read_cells(path)) == {("--method clip", 0, "train"), ("--method clip", 0, "zeroshot")}


def test_a_script_that_fails_ends_with_its_last_words(tmp_path):
    lab = reproduce.Lab(tmp_path, tmp_path / "cells.jsonl", quick=False, jobs=1, only=())
    with pytest.raises(SystemExit, match="--method nothing is unknown"):
        lab.train("--method nothing --data shapes:train=64", 0, known=False)
    assert not (tmp_path / "cells.jsonl").exists()
