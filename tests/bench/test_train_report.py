"""Tables of the training step from made-up records: the numbers here are nobody's."""

import json

import pytest
import report
import train_report
from train_subjects import BASE


def record(provider, step_ms, group="a", **other):
    return {
        "group": group,
        "provider": provider,
        "name": "small",
        "model": "made_up",
        "size": 32,
        "batch": 10,
        "watched_steps": 7,
        "dtype": "bfloat16",
        "step_ms": step_ms,
        "parameters": 1_000_000,
        "peak_bytes": 2**20,
        "launches": 1234.0,
        "busy": 0.5,
        "flop_image": 1e9,
        "families_ms": {"convolution": 3.0, "pointwise": 1.0},
        **other,
    }


# The machine is twice as slow in the second process: what counts is the ratio within each.
RECORDS = [
    record(BASE, [10.0, 20.0]),
    record("mentorch-plain-eager", [10.0, 20.0]),
    record("mentorch-eager", [12.5, 25.0], memory=[2**20, 3 * 2**19]),
    record(BASE, [20.0, 20.0], "b"),
    record("timm-compile", [10.0, 10.0], "b", families_ms={"matrix multiply": 9.0}),
]
RESULT = {
    "subject": "train",
    "device": "Made-up CPU, 2 cores",
    "date": "2020-01-01",
    "commit": "abc",
    "load_before": 0.1,
    "load_after": 0.2,
    "torch": "2.0",
    "work": {"rounds": 2},
    "records": RECORDS,
    "left_out": [
        {"provider": "small/mentorch-graph", "reason": "no GPU"},
        {"provider": "irv2/mentorch-graph", "reason": "no GPU"},
        {"provider": "irv2/timm-compile", "reason": "too long"},
    ],
}


def cells(table, name):
    header, *rows = table
    (found,) = [row for row in rows if row[0] == name]
    return dict(zip(header, found, strict=True))


def test_ratios_are_of_the_same_process_and_round():
    assert train_report.relative(RECORDS, RECORDS[2]) == [0.8, 0.8]
    assert train_report.relative(RECORDS, RECORDS[4]) == [2.0, 2.0]


def test_another_batch_counts_in_images():
    records = [record(BASE, [10.0]), record("mentorch-eager", [10.0], batch=5)]
    assert train_report.relative(records, records[1]) == [0.5]


def test_compile_is_reached_by_way_of_the_base():
    assert train_report.to_compile(RECORDS, RECORDS[2]) == pytest.approx(0.4)
    assert train_report.to_compile(RECORDS[:3], RECORDS[2]) is None  # it was left out


def test_the_fastest_comes_first_and_losing_rows_are_there():
    table = list(train_report.step_table(RECORDS, "small", None))
    assert table[1][0] == "timm-compile"
    assert table[-1][0] == "mentorch-eager"
    lost = cells(table, "mentorch-eager")
    assert lost[f"× {BASE}"] == "0.800 (0.800–0.800)"
    assert lost["× timm-compile"] == "0.400"
    assert lost["images/s"] == "600.0 (400.0–800.0)"
    assert (lost["busy"], lost["launches"], lost["MFU"]) == ("50.0%", "1,234", "–")


def test_the_base_stands_once_with_the_samples_of_all_processes():
    base = cells(train_report.step_table(RECORDS, "small", None), BASE)
    assert base["ms a step"] == "20.00"  # the median of 10, 20, 20, 20
    assert base[f"× {BASE}"] == "1.000"


def test_mfu_is_of_a_known_peak_and_its_dtype():
    one = record("mentorch-eager", [10.0])  # 1000 images/s of 1 GFLOP: 1 TFLOP/s
    assert train_report.mfu(one, 4e12) == pytest.approx(0.25)
    assert train_report.mfu(one, None) is None
    assert train_report.mfu({**one, "dtype": "float32"}, 4e12) is None
    assert train_report.peak_of("NVIDIA H100 80GB HBM3; A CPU, 16 cores") == 989.4e12
    assert train_report.peak_of("Made-up CPU, 2 cores") is None


def test_the_cost_of_reweighting_is_a_quotient_of_times():
    (line,) = train_report.reweighting(RECORDS, "small")
    assert line == "- reweighting, eager: a step takes 1.250 times that of plain"


def test_families_stand_by_cost_and_none_is_lost():
    table = list(train_report.family_table(RECORDS, "small"))
    assert table[0] == ["provider, ms a step", "convolution", "matrix multiply", "pointwise"]
    compiled = cells(table, "timm-compile")
    assert (compiled["convolution"], compiled["matrix multiply"]) == ("0.00", "9.00")


def test_memory_is_told_at_both_ends():
    (line,) = train_report.memory(RECORDS, "small")
    assert line == "- memory, mentorch-eager: 1.0 MiB before 7 steps, 1.5 MiB after"


def test_reasons_are_told_once():
    assert list(train_report.left_out(RESULT["left_out"])) == [
        "- `small/mentorch-graph`, `irv2/mentorch-graph`: no GPU",
        "- `irv2/timm-compile`: too long",
    ]


def test_end_to_end_is_held_against_its_own_engine():
    def one(engine, provider, *images_s):
        return {"engine": engine, "provider": provider, "batch": 8, "images_s": images_s}

    records = [
        one("eager", "synthetic", 10.0, 20.0),
        one("eager", "end-to-end", 9.0, 18.0),
        one("graph", "synthetic", 40.0),
        one("graph", "end-to-end", 20.0),
    ]
    lines = list(train_report.end_table(records))
    assert [line[-1] for line in lines[1:]] == [
        "1.000 (1.000–1.000)",
        "0.900 (0.900–0.900)",
        "1.000",
        "0.500",
    ]


def test_results_stand_in_a_part_of_their_own(tmp_path):
    (tmp_path / "train-made-up.json").write_text(json.dumps(RESULT))
    text = report.render(tmp_path)
    assert "Nothing has been measured yet on a GPU" in text  # these are no kernels
    assert text.index("# The training step") < text.index("## train, Made-up CPU, 2 cores")
    assert "### small: made_up, 32 px, bfloat16, 1.00 M parameters" in text
    assert "TFLOP/s" not in text  # nothing is said of a peak that is not known


def test_the_picture_is_drawn_for_every_training_result(tmp_path):
    (tmp_path / "train-made-up.json").write_text(json.dumps(RESULT))
    end = {**RESULT, "subject": "train-end-to-end"}
    (tmp_path / "train-end-to-end-made-up.json").write_text(json.dumps(end))
    (path,) = train_report.plot_all(tmp_path)
    assert path == tmp_path / "train" / "train-made-up.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_process_that_had_to_halve_its_batch_is_not_the_bases_row():
    halved = [
        record(BASE, [5.0, 5.0], "c", batch=5),
        record("mentorch-graph", [5.0, 5.0], "c", batch=5),
    ]
    base = cells(train_report.step_table([*RECORDS, *halved], "small", None), BASE)
    assert (
        base["images/s"] == cells(train_report.step_table(RECORDS, "small", None), BASE)["images/s"]
    )
