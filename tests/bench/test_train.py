"""What bench_train plans and checks. The numbers here are nobody's."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import train_measure
import train_providers
import train_subjects
from fresh import TooLong
from torch import nn
from train_measure import Runner
from train_subjects import BASE, Group, Subject

bench_train = import_module("bench_train")
SMALL = Subject("small", "cifar_resnet20", 16, 4, 10, watched_steps=1)
BOTH = (train_subjects.ON_GPU, train_subjects.ON_CPU)


def test_a_providers_name_says_who_and_how():
    # The longest engine first: "compile-graph" ends in "graph", too.
    assert train_subjects.split("mentorch-plain-compile-graph") == (
        "mentorch-plain",
        "compile-graph",
    )
    assert train_subjects.split("timm-eager") == ("timm", "eager")
    with pytest.raises(ValueError, match="'timm' is no provider"):
        train_subjects.split("timm")


@pytest.mark.parametrize("subjects", BOTH, ids=["gpu", "cpu"])
def test_every_provider_is_measured_once_a_subject_beside_the_base(subjects):
    groups = train_subjects.groups(subjects)
    assert all(group.providers[0] == BASE for group in groups)
    for subject in subjects:
        found = [p for g in groups if g.subject == subject for p in g.providers[1:]]
        wanted = {"mentorch-plain-eager", "timm-compile"}
        wanted |= {f"mentorch-{engine}" for engine in ("eager", "graph", "compile-graph")}
        if subject.name == "irv2":
            wanted |= {"mentorch-fast-eager", "mentorch-fast-compile-graph"}
            wanted |= {"mentorch-fused-eager", "mentorch-fused-graph"}
        else:
            wanted |= {"mentorch-compile", "mentorch-plain-graph"}
        assert sorted(found) == sorted(wanted)


def test_a_short_budget_has_something_of_every_subject():
    first = train_subjects.groups(train_subjects.ON_GPU)[: len(train_subjects.ON_GPU)]
    assert {group.subject.name for group in first} == {"irv2", "resnet50", "small"}


def test_parts_are_the_whole_and_fit_into_ten_minutes():
    parts = [train_subjects.groups(train_subjects.ON_GPU, part) for part in ("eager", "compiled")]
    whole = train_subjects.groups(train_subjects.ON_GPU)
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, whole))
    assert not any("compile" in provider for group in parts[0] for provider in group.providers)
    assert train_subjects.estimate_s(parts[0]) < 450


def test_the_estimate_counts_what_is_compiled_and_captured():
    def seconds(*providers):
        return train_subjects.estimate_s([Group(SMALL, (BASE, *providers))])

    one, two = seconds("mentorch-eager"), seconds("mentorch-eager", "mentorch-plain-eager")
    assert two - one == pytest.approx(
        train_subjects.BUILD_S + train_subjects.ROUNDS * train_subjects.SAMPLE_S
    )
    assert seconds("mentorch-graph") - one == pytest.approx(train_subjects.CAPTURE_S)
    compiled = seconds("mentorch-compile", "mentorch-plain-compile")
    assert compiled - two == pytest.approx(train_subjects.COMPILE_S)  # the second is cached


@pytest.mark.parametrize(
    ("model", "engine", "has_gpu", "has_compiler", "reason"),
    [
        ("cifar_resnet20", "eager", False, False, ""),
        ("cifar_resnet20", "graph", False, True, "no GPU"),
        ("cifar_resnet20", "compile-graph", False, True, "no GPU"),
        ("cifar_resnet20", "compile", False, True, ""),
        ("resnet50", "compile", False, True, "compiling it for a CPU takes minutes"),
        ("resnet50", "compile", True, True, ""),
        ("resnet50", "compile", True, False, "no C++ compiler"),
        ("resnet50", "graph", True, False, ""),  # a graph alone compiles nothing
    ],
)
def test_what_is_not_here_says_so(model, engine, has_gpu, has_compiler, reason):
    missing = train_subjects.why_missing(model, engine, has_gpu=has_gpu, has_compiler=has_compiler)
    assert missing.startswith(reason)
    assert bool(missing) == bool(reason)


def test_nothing_is_begun_after_the_budget():
    assert train_subjects.why_spent(100.0, 99.9, 450.0) == ""
    assert train_subjects.why_spent(100.0, 100.1, 450.0) == "the time budget of 450 s is spent"


def runner(provider, *loss, parameters=10, idle=0):
    return Runner(provider, None, {"loss": loss, "parameters": parameters, "idle": idle})


AGREEING = (
    runner(BASE, 2.0, 1.9),
    runner("mentorch-plain-eager", 2.0, 1.9),
    runner("mentorch-eager", 2.0, 1.95),  # its second loss is another: its samples are weighed
    runner("mentorch-fast-eager", 2.0, 1.95),
)


def test_those_that_did_the_same_work_agree():
    train_measure.agree(list(AGREEING), torch.float32)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (runner("mentorch-plain-eager", 2.001, 1.9), "loss"),  # another forward pass
        (runner("mentorch-plain-eager", 2.0, 1.8), "loss"),  # another update
        (runner("mentorch-fast-eager", 2.0, 1.9), "loss"),  # not weighed as mentorch is
        (runner("timm-compile", float("nan"), 1.9), "loss"),
        (runner("timm-compile", 2.0, 1.9, parameters=9), "parameters:"),
        (runner("timm-compile", 2.0, 1.9, idle=1), "not trained"),
    ],
)
def test_other_work_is_noticed(wrong, says):
    with pytest.raises(AssertionError, match=says):
        train_measure.agree([*AGREEING, wrong], torch.float32)


def test_parameters_that_are_not_trained_are_counted():
    model = nn.Linear(2, 2)
    work = SimpleNamespace(weights={n: p.detach().clone() for n, p in model.named_parameters()})
    assert train_measure._idle(model, work) == 2  # no gradients yet
    model(torch.ones(1, 2)).sum().backward()
    assert train_measure._idle(model, work) == 1  # the weight has not changed; a bias need not
    with torch.no_grad():
        model.weight += 1
    assert train_measure._idle(model, work) == 0


def test_a_small_process_measures_all_its_providers():
    providers = [BASE, "mentorch-plain-eager", "mentorch-eager"]
    found = train_measure.measure(
        "small", vars(SMALL), providers, rounds=2, sample_s=0.0, budget_s=60.0, precision="fp32"
    )
    assert found["left_out"] == {}
    assert [record["provider"] for record in found["records"]] == providers
    for record in json.loads(json.dumps(found["records"])):  # as `fresh` hands it on
        assert len(record["step_ms"]) == 2
        assert min(record["step_ms"]) > 0
        assert record["dtype"] == "float32"
        assert 0 < record["busy"] <= 1
        assert record["launches"] > 100  # 20 layers, forward and backward
        assert record["families_ms"]["convolution"] > 0
        assert ("memory" in record) == (record["provider"] == "mentorch-eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there are graphs")
def test_an_engine_that_gives_way_is_not_measured_under_its_name():
    work = train_providers.make_work(SMALL, torch.float32, torch.device("cpu"))
    eager = train_providers.setup("mentorch-eager", work)
    graph = train_providers.setup("mentorch-graph", work)
    eager.step()
    graph.step()
    assert train_providers.why_another(eager) == ""
    assert "not captured in a CUDA graph" in train_providers.why_another(graph)
    graph.spade.news[:] = ["the student is compiled", "the step is captured in one CUDA graph"]
    assert train_providers.why_another(graph) == ""


def test_without_time_everything_is_left_out():
    found = train_measure.measure(
        "small", vars(SMALL), [BASE, "mentorch-eager"], rounds=1, sample_s=0.0, budget_s=-1.0
    )
    assert found["records"] == []
    assert set(found["left_out"].values()) == {"the time budget of -1 s is spent"}


def test_the_work_of_a_training_step_is_three_forward_passes_but_for_the_first_layer():
    # resnet20 at 32 px is 40.6 M multiply-adds forward (the paper has 0.27 M parameters, 41 M
    # FLOP); backward twice that, but for the images' gradient, which nobody needs.
    found = train_measure.training_flop(Subject("small", "cifar_resnet20", 32, 4, 10))
    assert 2 * 3 * 40.0e6 < found < 2 * 3 * 41.0e6


class Config:
    """Options of a run."""

    def __init__(self, quick=False, budget_s=100.0):
        self.options = {"--bench-quick": quick, "--bench-budget-s": budget_s, "--bench-plan": False}

    def getoption(self, name):
        return self.options[name]


class Benchmark:
    """pytest-benchmark's fixture: returns or raises what it was given."""

    def __init__(self, found):
        self.found, self.extra_info, self.skipped = found, {}, False
        self.asked = {}

    def pedantic(self, call, args, kwargs):
        self.asked = kwargs
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def session(**options):
    return bench_train.Session(Config(**options), "train", {}, ("train_measure", "measure"), {})


GROUP = Group(SMALL, (BASE, "mentorch-eager", "mentorch-graph"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there are graphs")
def test_a_process_goes_without_what_cannot_be_had():
    run, benchmark = session(), Benchmark({"records": [{"provider": BASE}], "left_out": {}})
    run.measure_group(GROUP, benchmark)
    assert benchmark.asked["providers"] == [BASE, "mentorch-eager"]
    (gone,) = run.result()["left_out"]
    assert gone == {
        "provider": "small/mentorch-graph",
        "reason": "no GPU, so there are no CUDA graphs",
    }
    assert run.result()["records"] == [{"group": str(GROUP), "provider": BASE}]


def test_a_process_that_takes_too_long_is_left_out_and_the_run_is_whole():
    run = session()
    with pytest.raises(pytest.skip.Exception, match="too long"):
        run.measure_group(GROUP, Benchmark(TooLong("it took too long")))
    (gone,) = [row for row in run.result()["left_out"] if row["provider"] == str(GROUP)]
    assert gone["reason"] == "it took too long"
    assert run.is_whole([(0, str(GROUP))])


def test_a_failure_of_ours_is_an_error():
    failure = bench_train.fresh.Failed("AssertionError: loss")
    with pytest.raises(bench_train.fresh.Failed):
        session().measure_group(GROUP, Benchmark(failure))
    with pytest.raises(pytest.skip.Exception, match="loss"):  # timm's compile is a peer
        session().measure_group(Group(SMALL, (BASE, "timm-compile")), Benchmark(failure))


def test_after_the_budget_the_rest_is_left_out():
    run = session(budget_s=-1.0)
    with pytest.raises(pytest.skip.Exception, match="the time budget of -1 s is spent"):
        run.measure_group(GROUP, Benchmark({}))


def test_a_quick_run_is_never_whole_so_it_writes_nothing():
    assert session().is_whole([])
    assert not session(quick=True).is_whole([])
