"""What a profile says of a run, and that the run does not notice.

Names of kernels are from traces of cuDNN 9, cutlass, PyTorch, Inductor and NCCL. Traces of a GPU
are made up: that CUPTI fills them in the same way was not seen yet, it needs one.
"""

import gzip
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from mentorch.engine import job as job_module
from mentorch.engine.cli import parse
from mentorch.engine.config import RunConfig
from mentorch.engine.data.pipelines import Loader
from mentorch.engine.distributed import World
from mentorch.engine.job import run
from mentorch.engine.launch import STOPPED
from mentorch.engine.profile import (
    FAMILIES,
    WARM_UP,
    Tracer,
    busy_share,
    family,
    summarise,
    window,
)
from mentorch.engine.profile_summary import WAITING
from mentorch.engine.watchdog import Progress

from .runs import assert_same_run, only_run

NAMES = {
    "convolution": (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpg"
        "roupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x3"
        "2_stage4_warpsize2x2x1_g1_tensor16x8x16_kernel_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x64_32x"
        "6_nhwc_unity_stride_align8>(cutlass_tensorop_bf16_s16816dgrad_optimized::Params)",
        "void cudnn::cnn::wgrad_alg0_engine<float, 128, 5, 5, 3, 3, 3, false, 512>(int, int)",
        "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false, false>(int)",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>",
        "triton_tem_fused_convolution_4",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
    ),
    "matrix multiply": (
        "nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_nt",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_nn>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, float, float>(...)",
        "triton_tem_fused_mm_0",
        "aten::addmm",
        "aten::_scaled_mm",
    ),
    "batch norm": (
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>(...)",
        "void cudnn::bn_bw_1C11_kernel_new<__half, float, float2, 512, true, 1>(...)",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var>",
        "triton_red_fused__native_batch_norm_legit_functional_3",
        "triton_poi_fused__native_batch_norm_legit_functional_relu_5",
        "batch_norm_relu_fwd_kernel",
        "aten::native_batch_norm_backward",
    ),
    "pointwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat1"
        "6>, std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>)",
        "triton_poi_fused_add_mul_relu_12",
        "triton_poi_fused_convolution_7",  # a bias
        "aten::threshold_backward",
        "aten::clamp_min",
        "aten::add_",
    ),
    "reduction": (
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<flo"
        "at, float, float, float>, unsigned int, float, 4> >(...)",
        "void (anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>(float*, int)",
        "triton_red_fused_sum_threshold_backward_7",
        "triton_per_fused__log_softmax_nll_loss_forward_2",
        "aten::_log_softmax_backward_data",
        "aten::mean",
    ),
    "pooling": (
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>(...)",
        "void at::native::(anonymous namespace)::avg_pool2d_out_cuda_frame_nhwc<float, float, int>",
        "triton_poi_fused_max_pool2d_with_indices_4",
        "aten::max_pool2d_with_indices_backward",
    ),
    "copies and casts": (
        "void cudnn::engines_precompiled::nhwcToNchwKernel<__half, __half, float, false, true>",
        "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true>",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Tenso"
        "rIteratorBase&)::{lambda()#3}::operator()() const::{lambda()#7}>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, ...>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous)>",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "triton_poi_fused__to_copy_5",
        "aten::_to_copy",
        "aten::cat",
    ),
    "optimiser": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous n"
        "amespace)::TensorListMetadata<3>, at::native::(anonymous)::FusedSgdMathFunctor<float, 3>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous n"
        "amespace)::TensorListMetadata<1>, at::native::(anonymous)::LpNormFunctor<float, float>>",
        "aten::_fused_sgd_",
        "aten::_foreach_mul",
    ),
    "reweighting": (
        "_reweight_fwd_kernel",
        "_reweight_one_pass_kernel",
        "_cross_entropy_bwd_kernel",
        "_percentile_kernel",
        "_record_kernel",
        "weigh_kernel",
        "mentorch::reweight_step",
    ),
    "gradient exchange": (
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "nccl:all_reduce",
        "gloo:all_reduce",
    ),
    "data": (WAITING, "void dali::BatchedSeparableResampleKernel<1, float>(...)"),
    "other": (
        "aten::as_strided",
        "aten::empty",
        "autograd::engine::evaluate_function: AddBackward0",
    ),
}


@pytest.mark.parametrize(
    ("wanted", "name"), [(wanted, name) for wanted, names in NAMES.items() for name in names]
)
def test_a_name_tells_the_family(wanted, name):
    assert family(name) == wanted


def test_every_family_has_a_name_that_tells_it():
    assert tuple(NAMES) == FAMILIES


def test_every_kernel_of_ours_is_known():
    """A new Triton kernel in kernels/ would be counted as "other" without anyone noticing."""
    folder = Path(job_module.__file__).resolve().parents[1] / "kernels"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    launched = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert "_reweight_fwd_kernel" in launched, "the search finds nothing"
    assert [name for name in launched if family(name) == "other"] == []


@pytest.mark.parametrize(
    ("intervals", "share"),
    [
        ([], 0.0),
        ([(3, 3)], 0.0),  # no length
        ([(0, 10)], 1.0),
        ([(6, 10), (0, 4)], 0.8),  # a gap, and not in order
        ([(0, 10), (2, 3), (20, 30)], 2 / 3),  # one within another must not shorten it
        ([(0, 10), (2, 3), (5, 12)], 1.0),  # nor make the next one count from its end
        ([(0, 4), (2, 8), (12, 16)], 12 / 16),  # two streams overlap
    ],
)
def test_busy_share(intervals, share):
    assert busy_share(intervals) == pytest.approx(share)


@given(
    wanted=st.integers(0, 60),
    epochs=st.integers(1, 6),
    per_epoch=st.integers(1, 40),
    data=st.data(),
)
def test_a_window_is_in_one_epoch_and_in_what_is_left(wanted, epochs, per_epoch, data):
    total = epochs * per_epoch
    done = data.draw(st.integers(0, total))
    start, end = window(wanted, done, total, per_epoch)
    assert done <= start <= end <= total
    assert end - start == min(wanted, per_epoch, total - done)
    if end > start:
        assert start // per_epoch == (end - 1) // per_epoch
        if total - done >= 2 * WARM_UP + per_epoch + wanted:
            assert start - done >= WARM_UP


@pytest.mark.parametrize(
    ("done", "wanted", "expected"),
    [
        (0, 2, (10, 12)),  # up to the last step of an epoch of 12
        (0, 3, (12, 15)),  # would cross it: from the next one's first
        (22, 5, (22, 24)),  # less is left than asked for: no warm-up
        (0, 99, (12, 24)),  # an epoch at most
        (0, 0, (10, 10)),
    ],
)
def test_windows_of_two_epochs_of_12_steps(done, wanted, expected):
    assert window(wanted, done, 24, 12) == expected


def _event(name, start, end, device=DeviceType.CUDA, mark=False, thread=1, children=(), own=None):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        device_type=device,
        is_user_annotation=mark,
        thread=thread,
        cpu_children=list(children),
        self_cpu_time_total=end - start if own is None else own,
    )


def _made_up(events, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    return summarise(SimpleNamespace(events=lambda: events), 2, torch.device("cuda"), 0.004)


def test_a_gpu_s_kernels_are_what_is_counted(monkeypatch):
    """Two steps in 4 ms; 1 ms of convolution, 0.5 of addition beside it, a copy later."""
    host = {"device": DeviceType.CPU}
    found = _made_up(
        [
            _event("sm90_xmma_fprop_implicit_gemm", 1000, 2000),
            _event("vectorized_elementwise_kernel", 1500, 2000),  # beside it, on another stream
            _event("Memcpy DtoD", 2500, 3000),
            _event("ProfilerStep#1", 0, 9000, mark=True),  # a range, drawn on the device as well
            _event("aten::convolution", 0, 800, **host),
            _event("cudaLaunchKernel", 100, 110, **host),
            _event("cudaGraphLaunch", 200, 210, **host),
            _event("cudaDeviceSynchronize", 300, 310, **host),
            _event(WAITING, 400, 800, mark=True, **host),
        ],
        monkeypatch,
    )
    assert (found.device, found.step_ms, found.peak_memory_bytes) == ("a GPU", 2.0, 3 * 2**30)
    assert found.busy == pytest.approx(0.75)
    assert (found.launches, found.host_launches) == (1.5, 1.0)
    assert found.waiting_ms == pytest.approx(0.2)
    assert {cost.name: (cost.ms, cost.share, cost.count) for cost in found.families} == {
        "convolution": (0.5, 0.5, 0.5),
        "pointwise": (0.25, 0.25, 0.5),
        "copies and casts": (0.25, 0.25, 0.5),
    }
    first, *_ = found.costliest
    assert (first.name, first.family) == ("sm90_xmma_fprop_implicit_gemm", "convolution")
    said = list(found.sentences())
    assert said[0].startswith("The device waits 25% of the time: launches or data.")
    assert "1 launches a step" in said[0]
    assert "50% goes to work that moves memory" in said[-1]


def test_a_busy_device_is_not_said_to_wait(monkeypatch):
    found = _made_up([_event("sm90_xmma_fprop_implicit_gemm", 0, 4000)], monkeypatch)
    assert list(found.sentences()) == [
        "The device is busy 100% of the time: its kernels set the speed.",
        "Most of the device's time: convolution (100%).",
    ]


def test_a_page_shows_the_15_costliest_and_breaks_at_no_name(monkeypatch):
    events = [_event(f"gemm|{n}", 0, n) for n in range(1, 31)]
    page = _made_up(events, monkeypatch).markdown()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == 15
    assert rows[0].startswith("| `gemm\\|30` | matrix multiply |")


def test_operators_count_their_own_time_and_only_those_that_work():
    """A linear layer: aten::linear calls aten::t (a view) and aten::addmm, which does the work."""
    x, layer = torch.randn(64, 64), torch.nn.Linear(64, 64)
    with torch_profile(activities=[ProfilerActivity.CPU]) as done:
        for _ in range(3):
            with record_function(WAITING):
                pass
            layer(x)
    found = summarise(done, 3, torch.device("cpu"))
    counts = {cost.name: cost.count for cost in found.costliest}
    assert counts["aten::addmm"] == 1
    assert counts["aten::linear"] == counts["aten::t"] == 0
    assert found.launches == sum(counts.values())
    times = {e.key: e.self_cpu_time_total for e in done.key_averages()}
    own = {cost.name: cost.ms for cost in found.costliest}
    assert own["aten::addmm"] == pytest.approx(times["aten::addmm"] / 3e3)
    assert sum(cost.share for cost in found.families) == pytest.approx(1)
    assert found.host_launches == 0
    assert found.waiting_ms > 0
    assert 0 < found.busy <= 1
    assert found.peak_memory_bytes > 2**26, "a process with torch holds more"


def test_operators_of_other_threads_are_left_out():
    """The loop's time is the main thread's; others work beside it."""
    cpu = DeviceType.CPU
    events = [_event("aten::add", n, n + 1, cpu) for n in range(3)]
    events += [_event("aten::mm", 0, 50, cpu, thread=2)]
    found = summarise(SimpleNamespace(events=lambda: events), 1, torch.device("cpu"))
    assert [cost.name for cost in found.costliest] == ["aten::add"]


def test_a_trace_of_nothing_says_so():
    found = summarise(SimpleNamespace(events=lambda: None), 1, torch.device("cpu"))
    assert (found.busy, found.families) == (0.0, [])
    with pytest.raises(ValueError, match="one traced step or more, got 0"):
        summarise(SimpleNamespace(events=lambda: None), 0, torch.device("cpu"))


def _profiling():
    return torch.autograd._profiler_enabled()


def test_a_run_is_traced_and_does_not_notice(without_evaluation, tmp_path, capsys):
    plain = replace(without_evaluation, out=tmp_path / "plain")
    assert run(plain) == 0
    assert not (only_run(plain) / "profile").exists()
    capsys.readouterr()
    assert run(replace(without_evaluation, profile=3)) == 0
    folder = only_run(without_evaluation)
    assert_same_run(only_run(plain), folder)
    summary = json.loads((folder / "profile" / "summary.json").read_text())
    assert (summary["steps"], summary["window"]) == (3, [12, 15])
    assert {"convolution", "batch norm", "data"} <= {cost["name"] for cost in summary["families"]}
    assert summary["step_ms"] > summary["waiting_ms"] > 0
    page = (folder / "profile" / "summary.md").read_text()
    assert "# 3 steps on cpu" in page
    with gzip.open(folder / "profile" / "trace.json.gz") as file:
        trace = json.load(file)["traceEvents"]
    marks = [e for e in trace if e.get("name") == WAITING and e.get("ph") == "X"]
    assert len(marks) == 3, "the trace has more or fewer than three steps"
    printed = capsys.readouterr().out
    assert "tracing steps 13 to 15\n" in printed
    assert f"profile: {folder / 'profile' / 'summary.md'}" in printed
    assert not _profiling()


def test_a_resumed_run_is_traced_from_where_it_goes_on(without_evaluation, monkeypatch, capsys):
    batches = Loader.batches

    def asking(self, *arguments, **options):
        for count, batch in enumerate(batches(self, *arguments, **options), 1):
            if count == 13:  # in the middle of the window, 12 to 15
                assert _profiling()
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Loader, "batches", asking)
    assert run(replace(without_evaluation, profile=3)) == STOPPED
    assert not _profiling()
    folder = only_run(without_evaluation)
    assert not (folder / "profile").exists()
    assert "before all steps to trace were taken" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(parse(RunConfig, RunConfig(), ["--resume", str(folder)])) == 0
    assert json.loads((folder / "profile" / "summary.json").read_text())["window"] == [21, 24]
    assert "tracing steps 22 to 24 after 8 of warm-up only" in capsys.readouterr().out


@pytest.fixture
def tracer(tmp_path):
    """Of 3 steps of a run of 24 that is not there, and what it says."""
    said = []
    spade = SimpleNamespace(
        world=World(device=torch.device("cpu")), step_count=0, total_steps=24, steps_per_epoch=12
    )
    return Tracer(3, spade, tmp_path, said.append, Progress()), said


def _steps(failing_at=99):
    for step in range(1, 25):
        assert step != failing_at
        torch.ones(8).add_(1)
        yield step


@pytest.mark.parametrize("step", [12, 13, 15])  # the profiler's own warm-up, first and last traced
def test_the_profiler_is_off_after_an_error(tracer, step):
    traces, said = tracer
    with pytest.raises(AssertionError):
        for _ in traces.steps(_steps(failing_at=step)):
            pass
    assert _profiling() == (step > 12)
    assert said == ["tracing steps 13 to 15"]
    traces.close()
    assert not _profiling()
    assert said[-1] == "the run ended before all steps to trace were taken: no profile"
    traces.close()  # a second time does nothing
    with torch_profile(activities=[ProfilerActivity.CPU]):  # another can begin
        pass


def test_only_the_window_is_traced(tracer):
    traces, _ = tracer
    on = [step for step in traces.steps(_steps()) if _profiling()]
    assert on == [13, 14]  # by the third, 15, it has ended
    found = json.loads((traces.folder / "summary.json").read_text())
    counts = {cost["name"]: cost["count"] for cost in found["costliest"]}
    assert counts["aten::add_"] == 1, "more or fewer steps than those of the window"


def test_a_full_disk_ends_no_run(tracer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mentorch.engine.profile.replace_text", full)
    traces, said = tracer
    assert list(traces.steps(_steps())) == list(range(1, 25))
    assert said[-1] == "the profile could not be written: [Errno 28] No space left on device"


def test_nothing_stands_between_a_run_and_its_steps_without_a_trace(tracer, tmp_path):
    _, said = tracer
    world = World(1, 2)
    spade = SimpleNamespace(world=world, step_count=0, total_steps=24, steps_per_epoch=12)
    elsewhere = Tracer(3, spade, tmp_path, said.append, Progress())
    spade.world = World()
    off = Tracer(0, spade, tmp_path, said.append, Progress())
    for silent in (off, elsewhere):
        steps = iter(())
        assert silent.steps(steps) is steps
        assert silent.batches(steps) is steps


def test_fewer_than_no_steps_are_refused():
    with pytest.raises(ValueError, match="profile must be at least 0, got -1"):
        RunConfig(profile=-1)
