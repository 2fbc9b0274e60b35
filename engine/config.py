"""The whole run as dataclasses: every field says what it means and in what unit.

Command lines are made from them (`mentorch.engine.cli`), and the resolved values are saved in the
run folder (`mentorch.engine.config_files`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Engine = Literal["eager", "compile", "graph", "compile-graph"]


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def _share(config: object, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"{name} is a share in [0, 1], got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained and evaluated on, and how images are cut and streamed."""

    train: Path | None = None
    """Training data: a data set's folder, a folder of shards that `mentorch shard` wrote, or an
    index (.parquet) of either."""
    evaluate: dict[str, Path] = field(default_factory=dict)
    """Validation sets by name: folders or indexes. Their classes are matched to those trained."""
    sources: tuple[str, ...] = ()
    """Train on samples of these sources only (WebVision: google, flickr); all when empty."""
    max_label: int | None = None
    """Train on labels below this number only (WebVision mini: 50); all when None."""
    noise: str = ""
    """Label noise put on the training samples, KIND:RATE, e.g. symmetric:0.4; none when empty. For
    kinds that need more than a rate, `mentorch noise` writes an index."""
    noise_seed: int = 0
    """Of that noise."""
    image_size: int = 299
    """Side of the images the student sees, pixels."""
    resize: int = 320
    """Evaluation: side the shorter edge is resized to before the centre is cut, pixels."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Training: share of an image's area that a random crop covers, from–to."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Training: width over height of a random crop, from–to."""
    mirror: bool = True
    """Training: mirror every other image."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from pixels in [0, 1], by channel."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divided by after that, by channel."""
    threads: int = 0
    """Decoding threads a rank; 0 shares the machine's cores out among its ranks."""
    read_threads: int = 8
    """Files read at the same time, a rank. Reading waits for storage: more than cores is right."""
    read_ahead: int = 4
    """Batches whose files are read ahead of the decoder."""
    shard_streams: int = 16
    """Of a sharded index: places that shards are read from side by side, over all ranks together
    (the largest divisor of the global batch up to this). More mix a batch better; at least one a
    rank, so that no two ranks read the same part of a shard."""
    shard_window: int = 1024
    """Of a sharded index: samples among which each of those streams is shuffled. More mix better;
    about streams times window images should fit into the host's page cache."""
    prefetch: int = 2
    """Decoded batches kept ready (DALI's prefetch_queue_depth)."""
    decoder_load: float = 0.9
    """Share of the JPEGs that a GPU's hardware decoder takes; its CUDA cores and the CPU take the
    rest. Higher leaves the CPU to read files."""
    decoder_size_hint: tuple[int, int] = (0, 0)
    """Width and height of the largest image that a GPU's decoder makes room for beforehand, pixels:
    larger ones later cost a pause each. (0, 0) lets it grow."""
    max_unusable: float = 0.1
    """Share of the rows between two lines of metrics that may be missing, because their files
    cannot be used, before the run stops: storage that is gone must not pass for training. What few
    rows may hold by chance is allowed besides."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "image_size", "resize", "read_threads", "prefetch", "shard_streams")
        _at_least(self, 0, "read_ahead", "threads", "shard_window")
        if self.image_size > self.resize:
            raise ValueError(
                f"resize ({self.resize}) must be at least image_size ({self.image_size}): the "
                "centre that is cut cannot be larger than the image"
            )
        _share(self, "decoder_load", "max_unusable")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < from ≤ to ≤ 1, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be 0 < from ≤ to, got {self.crop_ratio}")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The network that is trained (g_s)."""

    name: str = "inception_resnet_v2"
    """A model of timm, or one of ours: inception_resnet_v2_fast (timm's with less work, for the
    same weights), mentornet_resnet101, mentornet_inception (the paper's), small_cnn, small_mlp,
    cifar_resnet20, cifar_resnet32, cifar_resnet56."""
    drop_rate: float = 0.2
    """Dropout before the classifier, share of features."""
    channels_last: bool = True
    """Keep activations in NHWC memory order, which tensor cores want."""
    fused_norms: bool = False
    """Batch norm with ReLU, residual and concatenation by this project's kernels (GPUs;
    inception_resnet_v2_fast only). Off, because which wins has not been measured."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, more time.
    Models of timm with batch norm update its running statistics in both passes, so twice a step
    (as if momentum were 1 − (1 − momentum)²); inception_resnet_v2_fast does so once."""
    weights: Path | None = None
    """Weights to start a new run from: a .safetensors file, or a state dict that torch.save wrote
    (.pt, .pth, .pth.tar). A classifier of another width is left fresh."""

    def __post_init__(self) -> None:
        _share(self, "drop_rate")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """How much each sample is trusted (g_m)."""

    name: str = "pd"
    """A closed form (uniform, self_paced, linear, …), a MentorNet that ships with the package (pd,
    dd, …), a .safetensors file, or a baseline (gce, reed_soft, reed_hard, noise_layer). uniform
    with burn_in 0 is plain cross-entropy."""
    lambda1: float = 0.0
    """λ1 of a closed form, nats: where the weight starts to fall."""
    lambda2: float = 1.0
    """λ2 of linear, nats: over how much loss the weight falls from 1 to 0."""
    gamma: float = 2.0
    """γ of focal."""
    loss_percentile: float = 0.75
    """p of the loss percentile ℓ_pt; roughly the share of labels that is right, and three quarters
    of that for the dd that ships."""
    decay: float = 0.95
    """Of the moving average of that percentile, per step."""
    percentile_of: Literal["batch", "class"] = "batch"
    """ℓ_pt is that of the batch, as in the paper, or of the sample's class: its last losses, for
    data whose classes differ much in size."""
    burn_in: float = 0.2
    """Share of training before the curriculum sets in."""
    burn_in_dropout: float = 0.5
    """Share of samples dropped at random during burn-in."""
    burn_in_dropout_until: float | None = None
    """Share of training at which that gives way to example_dropout; None: with the burn-in."""
    example_dropout: float = 0.0
    """Share of samples dropped at random after burn-in."""
    late_dropout: float = 0.0
    """Share of samples dropped at random at the end of training."""
    late_dropout_from: float = 1.0
    """Share of training at which that end begins; 1: there is none."""
    exact_dropout: bool = False
    """Drop an exact count of samples, as the released code does, instead of tossing coins."""
    percentile_over: Literal["global", "local"] = "global"
    """Take the percentile over the batches of all ranks, or of each rank for itself."""
    freeze_epoch: bool = False
    """After burn-in let a MentorNet read the epoch percentage at which that ended, as released for
    DD."""
    moving_avg: Literal["updated", "lagged"] = "updated"
    """Compare losses with ℓ_pt after their batch (the paper), or before it (one pass on a GPU)."""
    history_steps: int = 1
    """Visits of a sample that a MentorNet's bi-LSTM looks at."""
    weight_lr: float = 0.0
    """Above 0, sample weights are latent variables that take one gradient step of this size along
    the closed form's G at every visit (Algorithm 1, line 9), in weight per nat; 1/λ2 lands on the
    optimum of linear."""
    trusted: float = 0.0
    """Above 0, learn the curriculum from the run itself (MentorNet DD; name must be dd): this share
    of the training samples, drawn by the seed among those with a known clean label, is its D'."""
    learn_at: tuple[float, ...] = (0.2, 0.3, 0.55, 0.8)
    """Then: shares of training at which it is learned again: at the end of burn-in, and some time
    after the learning rate has dropped."""
    lstm_units: int = 1
    """Then: hidden units of its bi-LSTM, a direction."""
    use_loss: bool = False
    """Then: let it read the loss, not just its difference from ℓ_pt."""
    use_label: bool = False
    """Then: let it read the given label: some classes' labels are wrong more often than others'."""
    sharpness: float = 4.0
    """Then: what the logit of the weight is multiplied by. 1: the weight is the probability that
    the label is right; large: it is 1 where that is above ½."""

    def __post_init__(self) -> None:
        _share(self, "loss_percentile", "burn_in", "trusted", "late_dropout_from")
        _at_least(self, 0, "weight_lr")
        _at_least(self, 1, "history_steps")
        if self.trusted and self.name != "dd":
            raise ValueError(
                f"trusted samples are for learning curriculum dd from the run, not {self.name!r}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    name: Literal["sgd", "lars", "lamb"] = "sgd"
    """SGD with momentum; or for batches of many thousands LARS (momentum, too) or LAMB (betas),
    timm's. Only torch's SGD never waits for the device, and can be captured (``train.engine``)."""
    trust_coefficient: float = 0.001
    """Of LARS: how far a layer moves in a step, as a share of its norm, at learning rate 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of LAMB: decays of the gradient's mean and mean square."""
    implementation: Literal["auto", "torch", "apex"] = "auto"
    """NVIDIA apex's FusedSGD and FusedLAMB, or what comes with torch and timm. auto takes apex's
    for LAMB where it is really installed, and torch's SGD, which alone never waits."""
    lr: float = 0.1
    """Learning rate after the warm-up, for the whole (global) batch."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = 1e-4
    """θ of Eq. 1 (as the factor of w in the gradient); norms and biases are left out."""
    scale_weight_decay: bool = False
    """Multiply the weight decay by the batch's mean sample weight, as the released code does."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises linearly from near 0."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """What follows the warm-up: down to 0 along a cosine, or times `gamma` at every milestone."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Of the step schedule, as shares of training."""
    gamma: float = 0.1
    """Factor of the learning rate at a milestone."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    average_decay: float = 0.0
    """Decay of the moving average of the student's weights, per step; 0 keeps no average. Where
    there is one, it is what is evaluated."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "lr", "momentum", "weight_decay", "warmup_epochs", "clip_norm", "gamma")
        _at_least(self, 0, "trust_coefficient")
        for beta in self.betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0.0 <= self.average_decay < 1.0:
            raise ValueError(f"average_decay must be in [0, 1), got {self.average_decay}")
        for share in self.milestones:
            if not 0.0 < share < 1.0:
                raise ValueError(f"milestones are shares of training in (0, 1), got {share}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at a time, and how precisely."""

    epochs: int = 90
    """Passes over the training samples."""
    batch_size: int = 256
    """Samples a step over all ranks together; the number of ranks must divide it."""
    accumulate: int = 1
    """Parts that each rank takes its share of the batch in, one after another, where memory is
    short; ranks exchange gradients once a step. ℓ_pt and the curriculum see every part as a batch
    of its own, so their moving averages take this many more steps."""
    eval_batch_size: int = 0
    """The same for evaluation; 0 takes `batch_size`."""
    precision: Precision = "auto"
    """Of the student's forward and backward pass (autocast): bf16 where the hardware has it, fp16
    (with loss scaling), fp32; auto is bf16 or fp32."""
    engine: Engine = "eager"
    """How a step is run: operation by operation (eager); the student's forward and backward pass
    through torch.compile; the whole step as one CUDA graph, which spares the host its launches; or
    both. The last two are for one GPU. What cannot be had is said, and eager or compile taken."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the end and a stop always write one."""
    checkpoint_steps: int = 0
    """Steps between further checkpoints, where an epoch takes hours; 0 writes none."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept, the latest; the best by top-1 on the first set is kept too."""
    log_every: int = 50
    """Steps between lines of metrics. Between them the host does not wait for the device."""
    ledger: bool = True
    """Note loss, weight, prediction and forgetting of every sample (`mentorch.engine.ledger`): 24
    bytes of device memory for each row of the training index, on every rank."""
    pictures: bool = True
    """In TensorBoard, the curriculum as a picture whenever it has changed, and after every epoch
    how many samples have which weight (from the ledger)."""

    max_skipped: int = 20
    """Steps with gradients that are not finite are skipped, by all ranks alike, and the samples
    behind them named in nonfinite.jsonl. More of them than this, with no line of metrics free of
    them in between, and the run stops."""
    first_step_timeout: float = 1800.0
    """Seconds for what may take long: the first step, the first batch of an evaluation, learning a
    curriculum, taking a checkpoint. A rank that makes no progress for longer says who holds it up,
    and ends; 0 waits for ever."""
    step_timeout: float = 300.0
    """Seconds for everything that was done before, a step or a batch from the loader."""

    def __post_init__(self) -> None:
        _at_least(
            self, 1, "epochs", "batch_size", "evaluate_every", "checkpoint_every", "log_every"
        )
        _at_least(self, 1, "keep_checkpoints", "accumulate")
        _at_least(self, 0, "eval_batch_size", "checkpoint_steps", "max_skipped")
        _at_least(self, 0, "first_step_timeout", "step_timeout")

    def is_evaluated(self, epoch: int) -> bool:
        """Whether there is an evaluation after an epoch, counted from 1."""
        return epoch == self.epochs or epoch % self.evaluate_every == 0


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks work together (torch's DistributedDataParallel)."""

    gradients: Literal["fp32", "bf16"] = "fp32"
    """What ranks exchange; bf16 halves the bytes, and rounds."""
    bucket_mb: float = 25.0
    """Gradients are exchanged in buckets of this size (MiB), while the rest is computed."""
    static_graph: bool = True
    """The student uses the same parameters in every step, which saves DDP looking for the others.
    Not for students that leave out layers at random. Has no effect with ``train.accumulate``."""
    sync_batchnorm: bool = False
    """Batch norms over the global batch (GPUs only), where each rank has few images."""

    def __post_init__(self) -> None:
        if self.bucket_mb <= 0:
            raise ValueError(f"bucket_mb must be above 0, got {self.bucket_mb}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    name: str = "run"
    """First part of the run folder's name."""
    out: Path = Path("runs")
    """Folder that run folders are made in."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU a rank where there are any."""
    folder: Path | None = None
    """Run folder to start in, or to go on in if a run was begun there: the option for jobs that are
    interrupted and started again by the same command. By default a new one in `out`."""
    seed: int = 0
    """Of initialisation, order, crops and dropout. Label noise has its own, in the index."""
    resume: Path | None = None
    """Run folder to go on with, from its latest checkpoint. Its saved configuration takes the place
    of the defaults, so that nothing else need be given."""
    profile: int = 0
    """Steps to trace, soon after the start or restart: `profile` in the run folder then says what
    they spend their time on (docs/throughput.md). 0 traces none."""
    dry_run: bool = False
    """Tell what the run would be, and train and write nothing: steps, memory, time, and whatever is
    wrong with these options (docs/command_line.md)."""
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        _at_least(self, 0, "profile")
        if self.resume and self.folder and self.resume != self.folder:
            raise ValueError(f"resume {self.resume} and folder {self.folder} are two run folders")
