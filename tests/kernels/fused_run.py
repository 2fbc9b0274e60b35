"""Training steps by `reweight` and by its definition in float64, compared."""

import torch

from mentorch.kernels.class_percentile import new_class_losses
from mentorch.kernels.mentor import ClosedForm, LstmWeights, MentorWeights
from mentorch.kernels.reweight import reweight, reweight_ref


def mentor(units=1, hidden=20, labels=2, use_label=False, output="c", seed=0):
    """A MentorNet of random weights; the default has the released dims."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.7

    lstms = [
        LstmWeights(random(4 * units, 2), random(4 * units, units), random(4 * units))
        for _ in range(2)
    ]
    return MentorWeights(
        random(labels, 3), random(100, 5), *lstms, random(hidden, 8 + 2 * units), random(hidden),
        random(1, hidden), random(1), use_label, output,
    )  # fmt: skip


def cast(curriculum, *target):
    """A curriculum's tensors moved to a device or dtype."""
    if isinstance(curriculum, ClosedForm):
        return curriculum

    def move(value):
        if isinstance(value, LstmWeights):
            return LstmWeights(*(t.to(*target) for t in value))
        return value.to(*target) if isinstance(value, torch.Tensor) else value

    return MentorWeights(*map(move, curriculum))


class Run:
    """The same training steps by `reweight` and by the definition in float64, compared.

    ``windows``: how many losses of how many classes are kept; None: ℓ_pt is of the batch.
    """

    def __init__(
        self, curriculum, device, *, step=50, history=None, upstream=1.7, windows=None, **options
    ):
        self.curriculum, self.device, self.upstream = curriculum, device, upstream
        self.kept = [windows and new_class_losses(*windows, 0.75, d) for d in (device, "cpu")]
        self.options = {"total_steps": 100, "seed": 11, "advance": True, **options}
        self.history = history
        self.state = [
            (torch.tensor(1.0, dtype=d), torch.tensor(step)) for d in (None, torch.double)
        ]
        self.tables = [history.clone(), history.double()] if history is not None else [None] * 2

    def step(self, logits, labels, sample_ids=None, atol=1e-5):
        """One step by both; the fused one's outcome and gradient."""
        results = []
        for which, (function, device, dtype) in enumerate(
            [(reweight, self.device, logits.dtype), (reweight_ref, "cpu", torch.double)]
        ):
            z = logits.detach().to(device, dtype).requires_grad_()
            avg, step = (t.to(device) for t in self.state[which])
            table = None if self.history is None else self.tables[which].to(device)
            curriculum = cast(self.curriculum, device)
            curriculum = cast(curriculum, torch.double) if which else curriculum
            ids = None if sample_ids is None else sample_ids.to(device)
            out = function(
                z, labels.to(device), curriculum, avg, step=step, sample_ids=ids, history=table,
                class_losses=self.kept[which], **self.options,
            )  # fmt: skip
            assert torch.equal(avg, out.loss_moving_avg)  # the state moved on
            gradient = torch.zeros_like(z)
            if out.loss.requires_grad:
                (gradient,) = torch.autograd.grad(out.loss, z, out.loss.new_tensor(self.upstream))
            self.state[which] = avg, step
            self.tables[which] = table
            results.append((out, gradient))
        (found, gradient), (expected, exact) = results
        for name in found._fields:
            torch.testing.assert_close(
                getattr(found, name).double().cpu(), getattr(expected, name), rtol=1e-5, atol=atol,
                equal_nan=True, msg=lambda m, name=name: f"{name}: {m}",
            )  # fmt: skip
        assert int(self.state[0][1]) == int(self.state[1][1])
        eps = torch.finfo(logits.dtype).eps
        torch.testing.assert_close(
            gradient.double().cpu(), exact, rtol=2 * max(eps, 1e-5), equal_nan=True,
            atol=max(2 * eps, atol) * exact.abs().nan_to_num(0).max().item() + 1e-7,
        )  # fmt: skip
        if self.history is not None:
            torch.testing.assert_close(
                self.tables[0][:-1].double().cpu(), self.tables[1][:-1], rtol=1e-5, atol=atol,
                equal_nan=True,
            )  # fmt: skip
        return found, gradient


def draw(batch, classes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator) * 2
    return logits.to(dtype), torch.randint(classes, (batch,), generator=generator)
