"""The reproduction's tables, without training: their runs are options of train.py, the page says what was found."""
import json
import re
import shlex
import sys

import numpy as np
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
    assert options.preset == "pocket" and shlex.split(run)[1] == options.method


def test_steps_are_those_that_train_takes():
    assert reproduce.steps_of("--method clip --data shapes:train=2000 --epochs 25") == 25 * 31
    assert reproduce.steps_of("--method clip --data shapes:train=2000 --epochs 25 --steps 7") == 7
    assert reproduce.steps_of("--method clip") == int(train.parse_train_options([]).epochs * (20_000 // 64))
    assert reproduce.steps_of(reproduce.system("unicl")) == reproduce.steps_of(reproduce.system("clip"))


def test_the_presets_own_value_is_a_row_of_the_preset():
    """A row's name is the value that its run has."""
    for name, option in dict(length="epochs", pool="pool", beta="mlm_weight").items():
        for row in TABLES[name].rows:
            options = train.parse_train_options(shlex.split(row.run))
            assert row.name == f"{getattr(options, option):g}" if name != "pool" else row.name == options.pool


def test_options_of_all_kinds():
    assert reproduce.setting("maskclip", causal=False, mask_ratio=0.5).endswith("--no-causal --mask-ratio 0.5")
    assert train.parse_train_options(shlex.split(reproduce.setting("maskclip", causal=False))).causal is False


def parsed(script: str, *rest: str):
    """What the script makes of its command line"""
    if script == "dense.py":
        kind, *rest = rest
        kinds = dict(words=lambda a: parse(dense.WordOptions, "", a, ("checkpoint",)), upernet=dense.parse_upernet,
                     zeroshot=lambda a: parse(dense.ZeroShotOptions, "", a, ("checkpoint",)),
                     maskrcnn=dense.parse_maskrcnn)
        return kinds[kind](rest)
    if script == "train.py":
        return train.parse_train_options(rest)
    if script == "finetune.py":
        return finetune.parse_options(rest)
    module = {"eval_zeroshot.py": eval_zeroshot, "eval_linear.py": eval_linear}[script]
    return parse(module.Options, "", rest, ("checkpoint",))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", reproduce.EVALUATIONS)
def test_an_evaluation_is_options_of_its_script(name, quick):
    script, instead, _ = reproduce.EVALUATIONS[name]
    common = ["--seed", "0", "--device", "cpu", "--out", "x", "--json", "y", *(instead if quick else [])]
    split = 2 if script[0] == "dense.py" else 1
    options = parsed(*script[:split], "last.pt", *script[split:], *common)
    assert options.checkpoint == "last.pt" and options.json == "y"


def cell(run, seed, evaluation, seconds=100.0, **values):
    return dict(run=run, seed=seed, evaluation=evaluation, values=values, seconds=seconds, commit="abc")


def cells_of(*cells):
    return {(c["run"], c["seed"], c["evaluation"]): c for c in cells}


def test_equal_seconds_follow_from_the_seconds_of_equal_steps():
    clip, slip = reproduce.system("clip"), reproduce.system("slip")
    rows = reproduce.tables(cells_of(cell(clip, 0, "train", 200.0), cell(slip, 0, "train", 500.0)))["systems"].rows
    late = [row for row in rows if row.group == "equal seconds"]
    paid = round(reproduce.steps_of(slip) * 200 / 500)
    assert [row.run for row in late] == [f"{slip} --steps {paid}"] and reproduce.steps_of(late[0].run) == paid


def test_what_is_missing():
    table = TABLES["beta"]
    everything = reproduce.wanted(table, 3, {})
    assert list(everything.values()) == 3 * len(table.rows) * [["zeroshot", "linear"]]
    run = table.rows[0].run
    left = reproduce.wanted(table, 3, cells_of(cell(run, 1, "zeroshot", top1=1.0, i2t=2.0, t2i=3.0)))
    assert {key for key in everything if left[key] != everything[key]} == {(run, 1)} and left[run, 1] == ["linear"]
    assert not reproduce.wanted(table, 3, {}, only=("detector",))


def test_a_number_has_its_own_count_of_seeds_where_the_command_gives_none():
    table = TABLES["ladder"]
    wanted = reproduce.wanted(table, 0, {})
    for evaluation, seeds in (("zeroshot", range(9)), ("linear", range(9)), ("finetune", range(3, 9)),
                              ("detector", range(3, 9))):
        assert {seed for (_, seed), names in wanted.items() if evaluation in names} == set(seeds)
    first = reproduce.wanted(table, 1, {}).items()
    assert {(seed, "zeroshot" in names, "detector" in names) for (_, seed), names in first} == {
        (0, True, False), (3, False, True)}
    assert {seed for _, seed in reproduce.wanted(TABLES["beta"], 0, {})} == set(SEEDS)
    assert [seed for _, seed in wanted] == sorted(seed for _, seed in wanted), "a seed is whole before the next begins"


def test_differences_are_told_seed_by_seed():
    clip, _, _, ema, maskclip = (row.run for row in TABLES["ladder"].rows)
    cells = cells_of(cell(maskclip, 8, "zeroshot", top1=9.0, i2t=1.0, t2i=1.0),
                     *(cell(clip, seed, "zeroshot", top1=seed, i2t=1.0, t2i=1.0) for seed in range(9)),
                     *(cell(ema, seed, "zeroshot", top1=seed + 2.0 * (seed > 0), i2t=1.0, t2i=1.0)
                       for seed in range(3)))
    page = reproduce.markdown(TABLES["ladder"], 0, cells)
    assert "| CLIP | 4.0 ± 2.7 *37.6* |" in page and "| + MLM = MaskCLIP | 9.0 (1 of 9) *44.5* |" in page
    assert "Less CLIP, seed by seed:" in page
    assert "| + EMA teacher | +1.3 ± 0.7 (+0.0, +2.0, +2.0) |" in page and "| + MLM = MaskCLIP | +1.0 (+1.0) |" in page


def test_the_page_holds_mean_spread_and_the_paper(tmp_path, monkeypatch):
    table = TABLES["beta"]
    run, steps = table.rows[2].run, reproduce.steps_of(table.rows[2].run)
    cells = cells_of(*(cell(run, seed, "zeroshot", top1=50.0 + seed, i2t=10.0, t2i=20.0) for seed in SEEDS),
                     cell(run, 0, "train", 321.0),
                     cell(table.rows[0].run, 0, "zeroshot", top1=9.0, i2t=1.0, t2i=2.0))
    for name in ("CELLS", "PAGE", "PICTURE", "RESULTS"):
        monkeypatch.setattr(reproduce, name, tmp_path / getattr(reproduce, name).name)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    reproduce.PAGE.write_text("# Title\n\nWhat was found.\n\n" + reproduce.MARK + "old")
    reproduce.report(0, cells)
    page = reproduce.PAGE.read_text()
    assert page.startswith("# Title\n\nWhat was found.") and "old" not in page
    assert f"| 0.05 | 51.0 ± 1.0 *44.5* | 10.0 ± 0.0 *70.1* | 20.0 ± 0.0 *45.6* | {steps} | 321 |" in page
    assert "| 1 | 9.0 (1 of 3) *36.5* |" in page and page.count("\n## ") == 1, "only what was measured"
    assert "Less the default, seed by seed:" in page and "| 1 | -41.0 (-41.0) |" in page
    assert not reproduce.PICTURE.exists() and not reproduce.RESULTS.exists()


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    """A dot is where its number is: of one seed each, the mean of the higher row is the higher on the page."""
    cells = cells_of(*(cell(row.run, 0, name, top1=30.0 + 10 * k, i2t=1.0, t2i=1.0)
                       for k, row in enumerate(TABLES["pool"].rows[:3]) for name in ("zeroshot", "linear")))
    sheet = np.asarray(reproduce.draw([TABLES["pool"]], 0, cells))
    means = (sheet[:, :420] == (0x1f, 0x5f, 0xbf)).all(axis=-1)
    columns = np.flatnonzero(means[45:250].any(axis=0))
    first, last = columns[columns < columns.min() + 9], columns[columns > columns.max() - 9]
    assert np.flatnonzero(means[45:, first].any(axis=1)).min() > np.flatnonzero(means[45:, last].any(axis=1)).max()
    more = cells | cells_of(*(cell(TABLES["pool"].rows[0].run, 1, name, top1=90.0, i2t=1.0, t2i=1.0)
                              for name in ("zeroshot", "linear")))
    again = np.asarray(reproduce.draw([TABLES["pool"]], 0, more))
    assert (again == sheet).all(), "a seed that one row has alone moves no mean"
    apart = cells_of(*(cell(TABLES["pool"].rows[k].run, k, "zeroshot", top1=30.0, i2t=1.0, t2i=1.0) for k in (0, 1)))
    assert reproduce.draw([TABLES["pool"]], 0, apart).size == (840, 275), "no seed in common: no panel"
    runs = [reproduce.setting(method) for method in ("clip", "maskclip")]
    curves = cells_of(*(cell(run, seed, "train", curve=[[100, 10.0], [200, 20.0 + seed]])
                        for run in runs for seed in (0, 1)))
    assert reproduce.draw_results(curves).size[1] == 460 and reproduce.draw_results({}) is None


@pytest.mark.parametrize("each, sign, told", [
    ([5.0], 1, "1 seed"),
    ([1.0, 2.0, 3.0], 0, "3 seeds"),
    ([1.0, 2.0, 3.0], 1, "leans to it, 3 seeds"),                       # 2 is 3.5 standard errors from 0, of 4.3
    ([1.5, 2.0, 2.5], 1, "**agrees**, 3 seeds"),                        # 6.9 of them
    ([1.5, 2.0, 2.5], -1, "**does not**, 3 seeds"),
    ([-1.0, 2.0, 0.5], -1, "level, 3 seeds"),
    ([2.0, 2.1], 1, "leans to it, 2 seeds"),                            # two seeds settle nothing
    ([-1.0, 2.0, 0.6, 2.0], -1, "leans against, 4 seeds"),
])
def test_a_claim_is_judged_by_students_t(each, sign, told):
    assert reproduce.verdict(each, sign) == told
    if len(each) > 2:
        table = pytest.importorskip("scipy.stats", reason="scipy is not installed").t.ppf(0.975, len(each) - 1)
        assert reproduce.T_95[len(each)] == pytest.approx(table, abs=0.006)


def test_claims_are_differences_of_the_seeds_that_both_have():
    run = reproduce.setting
    cells = cells_of(*(cell(run(method), seed, "zeroshot", top1=float(value), i2t=0.0, t2i=0.0)
                       for method, values in (("clip", {0: 60, 1: 70, 5: 10}), ("maskclip", {0: 61, 1: 73, 2: 99}))
                       for seed, value in values.items()))
    [claim] = reproduce.claims(cells).splitlines()[2:]
    assert claim.startswith("| MaskCLIP less CLIP: more | +2.0 ± 1.0 leans to it, 2 seeds |")


def test_the_pages_quote_what_the_cells_say():
    """Every difference with its error that README or the page tells by hand is one of the tables'."""
    page = reproduce.PAGE.read_text()
    written = set(re.findall(r"[+-]\d+\.\d ± \d+\.\d", page.split(reproduce.MARK)[1]))
    by_hand = reproduce.CLAIMED.sub("", page.split("## What the earlier preset taught")[0])
    by_hand += (reproduce.ROOT / "README.md").read_text()
    assert set(re.findall(r"[+-]\d+\.\d ± \d+\.\d", by_hand)) <= written


def test_cells_are_lines_of_a_file(tmp_path):
    path = tmp_path / "cells.jsonl"
    lab = reproduce.Lab(tmp_path, path, quick=False, jobs=1, only=())
    lab.record(**cell("--method clip", 0, "train"))
    lab.record(**cell("--method clip", 0, "zeroshot", top1=1.0))
    assert len(path.read_text().splitlines()) == 2 and json.loads(path.read_text().splitlines()[0])["commit"]
    lab.record(**cell("--method slip", 0, "train", 400.0), slower=2)
    cells = reproduce.read_cells(path)
    assert set(cells) == {("--method clip", 0, "train"), ("--method clip", 0, "zeroshot"),
                          ("--method slip", 0, "train")}
    assert cells["--method slip", 0, "train"]["seconds"] == 200, "as of the processor of the others"


def test_a_script_that_fails_ends_with_its_last_words(tmp_path):
    lab = reproduce.Lab(tmp_path, tmp_path / "cells.jsonl", quick=False, jobs=1, only=())
    with pytest.raises(SystemExit, match="--method nothing is unknown"):
        lab.train("--method nothing --data shapes:train=64", 0, known=False)
    assert not (tmp_path / "cells.jsonl").exists()


# ---- at full scale --------------------------------------------------------------------------------------------------

def full(capsys, out, *more) -> str:
    reproduce.main(["full", "--out", str(out), "--yfcc", "shards:my yfcc/{00..11}.tar", "--bpe", "merges.gz",
                    "--imagenet", "in1k", "--launch", "torchrun --nproc-per-node 8", *more])
    return capsys.readouterr().out


def test_commands_at_full_scale_are_options_of_their_scripts(capsys, tmp_path):
    shown = full(capsys, tmp_path / "a folder", "--train", "--accumulate 4 --precision fp16")
    lines = [line.partition("    # wants ") for line in shown.splitlines() if line.startswith("torchrun")]
    # a run a row; of Table 1 three numbers a row, of DeFILIP one; of Table 2 six evaluations, of MaskCLIP seven, of
    # CLIP, of which no dense task is reported, five
    assert len(lines) == 11 + 5 * 3 + 1 + 3 * 6 + 7 + 5
    recipes, seen = {"finetune.py": "imagenet", "upernet": "ade20k", "maskrcnn": "coco"}, set()
    for line, _, wants in lines:
        words = shlex.split(line)[3:]
        options = parsed(*words)
        kind = words[1] if words[0] == "dense.py" else words[0]
        seen.add(kind)
        assert getattr(options, "recipe", None) == recipes.get(kind)
        assert options.out.startswith(f"{tmp_path}/a folder/") or kind == "train.py"
        if kind == "train.py":
            assert options.precision == "fp16" and options.accumulate == 4 and options.batch_size == 4096
            assert options.data == (("CC3M",) if "--cc3m" in wants else ("shards:my yfcc/{00..11}.tar",))
        assert ("IMAGENET" in line) is False and ("--coco" in wants) == (kind == "maskrcnn")
    assert seen == {"train.py", "eval_zeroshot.py", "eval_linear.py", "finetune.py", "upernet", "maskrcnn", "zeroshot"}
    assert "--epochs 40 --lr 5e-4 --weight-decay 0.5" in shown, "SLIP's CLIP on CC3M"


def test_tables_at_full_scale_are_of_what_finished_runs_wrote(capsys, tmp_path):
    row = "method-maskclip-preset-vit-b16-yfcc15m"
    found = dict(zeroshot=dict(results=[dict(top1=0.441)]), linear=dict(results=dict(checkpoint=dict(top1=0.737))),
                 finetune=dict(top1=0.835), retrieval=dict(
                     results=[dict(image_to_text={"1": 0.7}, text_to_image={"1": 0.45})]),
                 upernet=dict(miou=0.502), detector=dict(box=dict(AP=0.451), mask=dict(AP=0.405)),
                 maps=dict(miou=0.123))
    before = full(capsys, tmp_path)
    (tmp_path / row).mkdir()
    (tmp_path / row / "curves.png").touch()
    for name, content in found.items():
        (tmp_path / row / f"{name}.json").write_text(json.dumps(content))
    shown = full(capsys, tmp_path)
    assert ("| + MLM = MaskCLIP | 44.1 *44.5* | 73.7 *73.7* | 83.5 *83.6* | 50.2 *50.5* | 45.1 *45.4* | 40.5 *40.9* | "
            "70.0 *70.1* | 45.0 *45.6* | 12.3 |") in shown
    assert "| SLIP | vit-b16-cc3m | *23.0* | *65.4* | *81.4* |" in shown, "what is not there yet"
    assert before.count(f"{row}/last.pt") == 7 and f"{row}/last.pt" not in shown, "what is done is not to be done"


def test_run_runs_what_has_its_data_and_stops_at_a_failure(capsys, tmp_path):
    log = tmp_path / "log"
    script = f"import sys; open({str(log)!r}, 'a').write(sys.argv[1] + chr(10)); sys.exit(sys.argv[1] == 'finetune.py')"
    launch = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    with pytest.raises(SystemExit, match="the command above failed"):
        full(capsys, tmp_path, "--run", "--launch", launch, "--only", "zeroshot", "finetune")
    assert log.read_text().split() == ["train.py", "finetune.py"], "zeroshot wants --classes, which is not given"


def test_the_paper_in_both_halves_of_a_table():
    assert reproduce.both_halves("clip") == {"0-shot": "26.1 / 17.1", "linear": "60.5 / 53.3",
                                             "fine-tuned": "74.3 / 78.5"}
    assert reproduce.both_halves("defilip") == {"0-shot": "36.4 / -"} and reproduce.both_halves("unicl") == {}


def test_the_papers_numbers_stand_under_their_headings():
    """Supplement Table 2's last row and the main text's sweeps, in whatever order the columns of a table are."""
    last = {"0-shot": 44.5, "linear": 73.7, "fine-tuned": 83.6, "UperNet mIoU": 50.5, "box AP": 45.4, "mask AP": 40.9,
            "I2T R@1": 70.1, "T2I R@1": 45.6}
    cells = cells_of(*(cell(TABLES["ladder"].rows[-1].run, 3, evaluation, **dict.fromkeys(values, 1.0))
                       for evaluation, (_, _, values) in reproduce.EVALUATIONS.items()))
    cells |= cells_of(*(dict(line, run=TABLES["ladder"].rows[0].run) for line in cells.values()))
    head, _, _, row = reproduce.markdown(TABLES["ladder"], 0, cells).splitlines()[2:6]
    shown = dict(zip(head.split("|"), row.split("|")))
    assert {h.strip(): float(text.split("*")[1]) for h, text in shown.items() if "*" in text} == last
    for name, value, headings in (("lambda", "1", ("0-shot", "linear")), ("beta", "1", ("0-shot", "I2T R@1"))):
        row = next(row for row in TABLES[name].rows if row.name == value)
        assert [row.paper[h] for h in headings] == ([38.5, 68.2] if name == "lambda" else [36.5, 51.7])
    for table in [*TABLES.values(), *reproduce.full_tables()]:
        assert all(set(row.paper) <= {*table.columns} for row in table.rows)
