"""Which kind of work a kernel or operator is, by its name: what a profile is summed by.

Names are all a trace has. They come from cuDNN and cutlass (assembled from what they do), from
PyTorch's own kernels (C++ templates, the functor says what), from Triton (the function's name),
from Inductor (``triton_<kind>_fused_<operators>_<number>``) and, on the CPU, from ATen's operators.

cuDNN hands some 1×1 convolutions to plain matrix multiplication; these count as that.
"""

import re
from functools import cache

FAMILIES = (
    "convolution",
    "matrix multiply",
    "batch norm",
    "pointwise",
    "reduction",
    "pooling",
    "copies and casts",
    "optimiser",
    "reweighting",
    "gradient exchange",
    "data",
    "other",
)

_OPERATOR = r"^aten::_*(?:foreach_)?"  # and an underscore at the end: the form in place
_POINTWISE = (
    "add|sub|rsub|mul|div|neg|abs|exp|log|sqrt|rsqrt|reciprocal|pow|relu6?|leaky_relu|gelu|silu|"
    "sigmoid|tanh|hardtanh|hardswish|clamp|clamp_min|clamp_max|where|masked_fill|threshold|eq|ne|"
    "lt|le|gt|ge|isfinite|isnan|isinf|bitwise_\\w+|logical_\\w+|lerp|addcmul|addcdiv|dropout|"
    "native_dropout|bernoulli|maximum|minimum|floor|round|sign|remainder|erf|random|uniform|normal"
)
_REDUCTION = (
    "sum|mean|var|std|norm|linalg_vector_norm|max|min|amax|amin|argmax|argmin|any|all|prod|cumsum|"
    "softmax|log_softmax|logsumexp|nll_loss\\w*|cross_entropy\\w*|topk|sort|kthvalue|count_nonzero"
)
_COPY = (
    "copy|to|to_copy|clone|contiguous|cat|stack|fill|zero|zeros|ones|full|pad|constant_pad_nd|"
    "index_select|index|gather|scatter|index_put|index_copy|slice_backward|select_backward|flip|"
    "arange|ones_like|zeros_like|full_like|new_zeros|new_ones|reshape_copy"
)

# The first that is found decides, so what is particular stands above what is general.
_PATTERNS = (
    # What the student is made of, though ours; Triton kernels and operators alike.
    ("batch norm", r"^(mentorch::)?_?batch_norm_"),
    ("pointwise", r"^(mentorch::)?_?scale_add_relu"),
    ("reduction", r"^_sum_parts_kernel"),
    # Ours: Triton kernels by function name (kernels/), their operators by the library's.
    ("reweighting", r"^mentorch::|^_reweight_|^weigh_kernel|^_percentile_|^_(record|tally)_kernel"),
    ("reweighting", r"^_cross_entropy_(fwd|bwd)"),
    # Ranks: NCCL's kernels, and gloo's work as torch names it.
    ("gradient exchange", r"^nccl|^gloo:|^c10d::|record_param_comms|all_?reduce|AllReduce"),
    # What the run waits for (`engine/profile.py` marks it), and decoding on the device.
    ("data", r"^data: |dali::|nvjpeg"),
    # Everything that goes over a list of parameters: the update, clipping, averaging.
    ("optimiser", r"multi_tensor_apply|^aten::_fused_(sgd|adam)|^aten::_foreach_|_amp_foreach"),
    ("optimiser", r"multi_tensor_(sgd|axpby|scale|l2norm)|^triton_for_fused"),
    # Before convolution: cuDNN's layout changes carry its namespace too.
    ("copies and casts", r"(nchw|nhwc)To(Nchw|Nhwc)|Memcpy|Memset|CatArrayBatchedCopy"),
    ("batch norm", r"bn_[fb]w|batch_?norm|BatchNorm"),
    ("pooling", r"_pool(?!_id)|[pP]ooling|MaxPool|AvgPool|max_pool|avg_pool"),
    # Inductor's kinds: poi pointwise, red and per reductions. One of casts only is a copy. Before
    # convolution: a bias that is added is called triton_poi_fused_convolution.
    ("copies and casts", r"^triton_poi_fused_+(to_copy|clone|copy|cat|_)+_\d+$"),
    ("pointwise", r"^triton_poi"),
    ("reduction", r"^triton_(red|per|split|mix)"),
    # "implicit_gemm" is a convolution: hence before matrix multiplication.
    ("convolution", r"[fdw](prop|grad)(?![a-z])|convolution|convolve|conv_?2d|conv_depthwise"),
    ("convolution", r"winograd|cudnn.*(conv|wgrad|dgrad)|cask|implicit_gemm|aten::.*_conv"),
    ("matrix multiply", r"gemm|nvjet|gemv|cublas|splitKreduce|triton_tem_fused|cutlass"),
    ("matrix multiply", r"^aten::_*(scaled_)?(mm|addmm|bmm|baddbmm|matmul|linear|dot|mv|addmv)$"),
    # PyTorch's kernels: the functor or the function before the template's arguments.
    ("copies and casts", r"copy_kernel|FillFunctor|index_(elementwise|select|copy)|gather_kernel"),
    ("reduction", r"reduce_kernel|[sS]oft[mM]ax|nll_loss|[rR]adix|cub::|[sS]ort|\bscan|top[kK]"),
    ("pointwise", r"elementwise|dropout|distribution"),
    # ATen's operators, where there are no kernels to look at.
    ("reduction", _OPERATOR + f"({_REDUCTION})(_backward(_data)?)?_?$"),
    ("copies and casts", _OPERATOR + f"({_COPY})_?$"),
    ("pointwise", _OPERATOR + f"({_POINTWISE})(_backward)?_?$"),
)
_COMPILED = tuple((name, re.compile(pattern)) for name, pattern in _PATTERNS)


@cache
def family(name: str) -> str:
    """The family, one of `FAMILIES`, of a kernel or operator.

    Args:
        name: as a trace has it: of a kernel, a copy or an operator ("aten::…").
    """
    return next((found for found, pattern in _COMPILED if pattern.search(name)), "other")
