"""The Triton kernels of `batch_norm`: what they compute and count is said there.

A grid's second axis goes over blocks of channels, each within one norm: a program looks up whose
its block is, and finds that norm's tensors in the tuples. Where V is an argument, the numbers of
each norm's channels and the strides come as multiples of it, as `pixels.tile_offsets` takes them.

Shapes as in `pixels`: C channels of all norms, N rows; P programs over rows, R rows and K channels
of a tile.
"""

from mentorch.kernels.backend import tl, triton
from mentorch.kernels.pixels import tile_offsets

# ---- Forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "C", "stride", "tiles"])
def batch_norm_statistics_kernel(
    x_ptr,  # [N, C], rows of stride · V
    part_ptr,  # [2, P, C] float32, written: mean − shift, Σ(x − mean)²
    N,
    C,  # of V
    stride,  # of V
    tiles,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Mean and Σ(x − mean)² of every part of the rows: Welford's update, lane by lane.

    Every channel is shifted by its first value: the digits of a mean far from 0 are then no longer
    those that the differences need.
    """
    first = tl.program_id(0).to(tl.int64) * tiles * R
    at_R = tl.arange(0, R)[:, None]
    block = tl.program_id(1)
    channel_K = (block * K + tl.arange(0, K))[None, :]
    shift_K = tl.load(x_ptr + channel_K, mask=channel_K < C * V, other=0.0).to(tl.float32)
    mean_RK = tl.zeros([R, K], tl.float32)
    m2_RK = tl.zeros([R, K], tl.float32)
    for tile in range(tiles):
        row = first + tile * R
        at_RK, there_K = tile_offsets(row, stride, block, C, V, R, K)
        there_RK = (row + at_R < N) & there_K
        x_RK = tl.load(x_ptr + at_RK, mask=there_RK, other=0.0).to(tl.float32) - shift_K
        delta_RK = tl.where(there_RK, x_RK - mean_RK, 0.0)
        mean_RK += delta_RK * (1.0 / (tile + 1))  # every lane that is there was so in each tile
        m2_RK += tl.where(there_RK, delta_RK * (x_RK - mean_RK), 0.0)
    count_R = tl.minimum((N - first - at_R + R - 1) // R, tiles).to(tl.float32)
    count = tl.minimum(N - first, tiles * R).to(tl.float32)
    mean_K = tl.sum(mean_RK * count_R, axis=0)[None, :] / count
    apart_RK = mean_RK - mean_K
    m2_K = tl.sum(m2_RK + count_R * apart_RK * apart_RK, axis=0)[None, :]
    to_K = part_ptr + tl.program_id(0) * (C * V) + channel_K
    tl.store(to_K, mean_K, mask=channel_K < C * V)
    tl.store(to_K + tl.num_programs(0) * (C * V), m2_K, mask=channel_K < C * V)


@triton.jit
def _combine_parts(
    part_ptr, channel_K, there_K, N, C, parts, span, P2: tl.constexpr
):  # fmt: skip
    """(mean − shift, Σ(x − mean)²) of all rows, each [1, K]."""
    part_P = tl.arange(0, P2)[:, None]
    there_PK = (part_P < parts) & there_K
    from_PK = part_ptr + part_P * C + channel_K
    mean_PK = tl.load(from_PK, mask=there_PK, other=0.0)
    m2_PK = tl.load(from_PK + parts * C, mask=there_PK, other=0.0)
    count_P = tl.where(part_P < parts, tl.minimum(N - part_P * span, span), 0).to(tl.float32)
    mean_K = tl.sum(mean_PK * count_P, axis=0)[None, :] / N
    apart_PK = mean_PK - mean_K
    return mean_K, tl.sum(m2_PK + count_P * apart_PK * apart_PK, axis=0)[None, :]


@triton.jit(do_not_specialize=["N", "C", "parts", "span"])
def batch_norm_combine_kernel(
    x_ptr,  # whose first row is the shift
    part_ptr,
    statistics_ptr,  # [2, C] float32, written: mean, 1 / √(σ² + ε)
    running_mean_ptrs,  # of each norm: [C] float32, updated
    running_var_ptrs,
    channels,  # of each norm
    N,
    C,  # of all norms
    parts,
    span,  # rows of a part
    momentum,
    eps,
    NORMS: tl.constexpr,
    UPDATE: tl.constexpr,
    P2: tl.constexpr,
    K: tl.constexpr,
):
    """The parts put together (Chan et al.), and the running statistics."""
    block = tl.program_id(0)
    first = 0
    for i in tl.static_range(NORMS):
        blocks = tl.cdiv(channels[i], K)
        if (block >= 0) & (block < blocks):
            at_K = (block * K + tl.arange(0, K))[None, :]
            there_K = at_K < channels[i]
            mean_K, m2_K = _combine_parts(
                part_ptr, first + at_K, there_K, N, C, parts, span, P2
            )  # fmt: skip
            shift_K = tl.load(x_ptr + first + at_K, mask=there_K, other=0.0)
            mean_K += shift_K.to(tl.float32)
            to_K = statistics_ptr + first + at_K
            tl.store(to_K, mean_K, mask=there_K)
            tl.store(to_K + C, 1.0 / tl.sqrt(m2_K / N + eps), mask=there_K)
            if UPDATE:
                mean_ptr, var_ptr = running_mean_ptrs[i], running_var_ptrs[i]
                old_K = tl.load(mean_ptr + at_K, mask=there_K, other=0.0)
                new_K = (1.0 - momentum) * old_K + momentum * mean_K
                tl.store(mean_ptr + at_K, new_K, mask=there_K)
                old_K = tl.load(var_ptr + at_K, mask=there_K, other=0.0)
                new_K = (1.0 - momentum) * old_K + momentum * (m2_K / (N - 1))
                tl.store(var_ptr + at_K, new_K, mask=there_K)
        block -= blocks
        first += channels[i]


@triton.jit
def _channel_values(statistics_ptr, weight_ptr, bias_ptr, first, C, at_K, there_K):
    """(mean, 1/√(σ² + ε), γ, β) of a block of one norm's channels, each [1, K]."""
    from_K = statistics_ptr + first + at_K
    mean_K = tl.load(from_K, mask=there_K, other=0.0)
    rstd_K = tl.load(from_K + C, mask=there_K, other=0.0)
    weight_K = tl.load(weight_ptr + at_K, mask=there_K, other=0.0)
    return mean_K, rstd_K, weight_K, tl.load(bias_ptr + at_K, mask=there_K, other=0.0)


@triton.jit
def _apply_rows(
    x_ptr, y_ptr, statistics_ptr, weight_ptr, bias_ptr, block, first, N, all_channels, channels,
    stride, y_stride, tiles, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y of one program's tiles, which are one norm's."""
    at_K = (block * K + tl.arange(0, K))[None, :]
    mean_K, rstd_K, weight_K, bias_K = _channel_values(
        statistics_ptr, weight_ptr, bias_ptr, first, all_channels, at_K, at_K < channels * V
    )
    begin = tl.program_id(0).to(tl.int64) * tiles * R
    for tile in range(tiles):
        row = begin + tile * R
        from_RK, there_K = tile_offsets(row, stride, block, channels, V, R, K)
        to_RK, _ = tile_offsets(row, y_stride, block, channels, V, R, K)
        there_RK = (row + tl.arange(0, R)[:, None] < N) & there_K
        x_RK = tl.load(x_ptr + first + from_RK, mask=there_RK, other=0.0).to(tl.float32)
        z_RK = (x_RK - mean_K) * rstd_K * weight_K + bias_K
        y_RK = tl.where(z_RK < 0.0, 0.0, z_RK)  # NaN stays, as in PyTorch
        tl.store(y_ptr + to_RK, y_RK.to(y_ptr.dtype.element_ty), mask=there_RK)


@triton.jit(do_not_specialize=["N", "C", "stride", "tiles"])
def batch_norm_relu_fwd_kernel(
    x_ptr,
    y_ptrs,  # of each norm, written
    statistics_ptr,
    weight_ptrs,
    bias_ptrs,
    channels,  # of each norm, of V
    y_strides,  # of V
    N,
    C,  # of all norms
    stride,  # of V
    tiles,
    NORMS: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """y = max(0, z), of all norms."""
    block = tl.program_id(1)
    first = 0
    for i in tl.static_range(NORMS):
        blocks = tl.cdiv(channels[i] * V, K)
        if (block >= 0) & (block < blocks):
            _apply_rows(
                x_ptr, y_ptrs[i], statistics_ptr, weight_ptrs[i], bias_ptrs[i], block, first, N, C,
                channels[i], stride, y_strides[i], tiles, V, R, K,
            )  # fmt: skip
        block -= blocks
        first += channels[i] * V


# ---- Backward -----------------------------------------------------------------------------------


@triton.jit
def _load_gradient(
    x_ptr, dy_ptr, row, block, N, channels, stride, dy_stride, mean_K, rstd_K, weight_K, bias_K,
    V: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(dz, x̂) of a tile, each [R, K]; 0 where there is nothing."""
    x_RK, there_K = tile_offsets(row, stride, block, channels, V, R, K)
    dy_RK, _ = tile_offsets(row, dy_stride, block, channels, V, R, K)
    there_RK = (row + tl.arange(0, R)[:, None] < N) & there_K
    x_RK = tl.load(x_ptr + x_RK, mask=there_RK, other=0.0).to(tl.float32)
    dy_RK = tl.load(dy_ptr + dy_RK, mask=there_RK, other=0.0).to(tl.float32)
    hat_RK = (x_RK - mean_K) * rstd_K
    return tl.where(hat_RK * weight_K + bias_K <= 0.0, 0.0, dy_RK), hat_RK


@triton.jit
def _sum_rows(
    x_ptr, dy_ptr, part_ptr, statistics_ptr, weight_ptr, bias_ptr, block, first, N, all_channels,
    channels, stride, dy_stride, tiles, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz x̂ over one program's tiles."""
    at_K = (block * K + tl.arange(0, K))[None, :]
    there_K = at_K < channels * V
    mean_K, rstd_K, weight_K, bias_K = _channel_values(
        statistics_ptr, weight_ptr, bias_ptr, first, all_channels, at_K, there_K
    )
    begin = tl.program_id(0).to(tl.int64) * tiles * R
    dz_RK = tl.zeros([R, K], tl.float32)
    dz_hat_RK = tl.zeros([R, K], tl.float32)
    for tile in range(tiles):
        new_RK, hat_RK = _load_gradient(
            x_ptr + first, dy_ptr, begin + tile * R, block, N, channels, stride, dy_stride, mean_K,
            rstd_K, weight_K, bias_K, V, R, K,
        )  # fmt: skip
        dz_RK += new_RK
        dz_hat_RK += new_RK * hat_RK
    to_K = part_ptr + tl.program_id(0) * all_channels + first + at_K
    tl.store(to_K, tl.sum(dz_RK, axis=0)[None, :], mask=there_K)
    to_K += tl.num_programs(0) * all_channels
    tl.store(to_K, tl.sum(dz_hat_RK, axis=0)[None, :], mask=there_K)


@triton.jit(do_not_specialize=["N", "C", "stride", "tiles"])
def batch_norm_relu_sums_kernel(
    x_ptr,
    dy_ptrs,  # of each norm
    part_ptr,  # [2, P, C] float32, written: Σ dz, Σ dz x̂
    statistics_ptr,
    weight_ptrs,
    bias_ptrs,
    channels,  # of each norm, of V
    dy_strides,  # of V
    N,
    C,  # of all norms
    stride,  # of V
    tiles,
    NORMS: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Parts of Σ dz and Σ dz x̂."""
    block = tl.program_id(1)
    first = 0
    for i in tl.static_range(NORMS):
        blocks = tl.cdiv(channels[i] * V, K)
        if (block >= 0) & (block < blocks):
            _sum_rows(
                x_ptr, dy_ptrs[i], part_ptr, statistics_ptr, weight_ptrs[i], bias_ptrs[i], block,
                first, N, C, channels[i], stride, dy_strides[i], tiles, V, R, K,
            )  # fmt: skip
        block -= blocks
        first += channels[i] * V


@triton.jit
def _gradient_of_rows(
    x_ptr, dy_ptr, dx_ptr, sum_ptr, statistics_ptr, weight_ptr, bias_ptr, block, first, N,
    all_channels, channels, stride, dy_stride, dx_stride, tiles, V: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """dx of one program's tiles, which are one norm's."""
    at_K = (block * K + tl.arange(0, K))[None, :]
    there_K = at_K < channels * V
    mean_K, rstd_K, weight_K, bias_K = _channel_values(
        statistics_ptr, weight_ptr, bias_ptr, first, all_channels, at_K, there_K
    )
    dz_K = tl.load(sum_ptr + first + at_K, mask=there_K, other=0.0) / N
    dz_hat_K = tl.load(sum_ptr + all_channels + first + at_K, mask=there_K, other=0.0) / N
    begin = tl.program_id(0).to(tl.int64) * tiles * R
    for tile in range(tiles):
        row = begin + tile * R
        dz_RK, hat_RK = _load_gradient(
            x_ptr + first, dy_ptr, row, block, N, channels, stride, dy_stride, mean_K, rstd_K,
            weight_K, bias_K, V, R, K,
        )  # fmt: skip
        dx_RK = weight_K * rstd_K * (dz_RK - dz_K - hat_RK * dz_hat_K)
        to_RK, there_1K = tile_offsets(row, dx_stride, block, channels, V, R, K)
        there_RK = (row + tl.arange(0, R)[:, None] < N) & there_1K
        tl.store(dx_ptr + first + to_RK, dx_RK.to(dx_ptr.dtype.element_ty), mask=there_RK)


@triton.jit(do_not_specialize=["N", "C", "stride", "dx_stride", "tiles"])
def batch_norm_relu_bwd_kernel(
    x_ptr,
    dy_ptrs,  # of each norm
    dx_ptr,  # [N, C], written
    sum_ptr,  # [2, C] float32: Σ dz, Σ dz x̂
    statistics_ptr,
    weight_ptrs,
    bias_ptrs,
    channels,  # of each norm, of V
    dy_strides,  # of V
    N,
    C,  # of all norms
    stride,  # of V
    dx_stride,  # of V
    tiles,
    NORMS: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """dx, of all norms."""
    block = tl.program_id(1)
    first = 0
    for i in tl.static_range(NORMS):
        blocks = tl.cdiv(channels[i] * V, K)
        if (block >= 0) & (block < blocks):
            _gradient_of_rows(
                x_ptr, dy_ptrs[i], dx_ptr, sum_ptr, statistics_ptr, weight_ptrs[i], bias_ptrs[i],
                block, first, N, C, channels[i], stride, dy_strides[i], dx_stride, tiles, V, R, K,
            )  # fmt: skip
        block -= blocks
        first += channels[i] * V
