"""Each baseline against its paper's formula in float64, written out naively."""

import pytest
import torch
import torch.distributed as dist

from mentorch.engine.baselines import Bootstrap, GeneralisedCrossEntropy, NoiseLayer
from mentorch.engine.distributed import distributed
from mentorch.engine.reweight import Reweight

B, C = 7, 5  # more rows than classes, an odd number of both


def _batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, C, generator=generator, dtype=torch.float64) * 3
    return logits, torch.randint(C, (B,), generator=generator)


def _reed_soft(p, y, beta=0.95):
    t = torch.eye(C, dtype=torch.float64)[y]
    return -((beta * t + (1 - beta) * p) * p.log()).sum(1)


def _reed_hard(p, y, beta=0.8):
    t, z = torch.eye(C, dtype=torch.float64)[y], torch.eye(C, dtype=torch.float64)[p.argmax(1)]
    return -((beta * t + (1 - beta) * z) * p.log()).sum(1)


def _noise_layer(p, y, epsilon=0.1):
    q = torch.full((C, C), epsilon / (C - 1), dtype=torch.float64)
    q.fill_diagonal_(1 - epsilon)
    return -(p @ q)[torch.arange(B), y].log()


def _gce(p, y, q=0.7):
    return (1 - p[torch.arange(B), y] ** q) / q


CASES = {
    "reed_soft": (Bootstrap("soft"), _reed_soft),
    "reed_hard": (Bootstrap("hard"), _reed_hard),
    "noise_layer": (NoiseLayer(C), _noise_layer),
    "gce": (GeneralisedCrossEntropy(), _gce),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_formulas(name):
    criterion, formula = CASES[name]
    logits, labels = _batch()
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = criterion(ours, labels)
    expected = formula(theirs.softmax(1), labels).mean()
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_limits_are_cross_entropy():
    logits, labels = _batch()
    plain = torch.nn.functional.cross_entropy(logits, labels).item()
    for criterion in (
        Bootstrap("soft", beta=1.0),
        Bootstrap("hard", beta=1.0),
        NoiseLayer(C, epsilon=1e-7),
        GeneralisedCrossEntropy(q=1e-7),
    ):
        assert criterion(logits, labels).item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ignored_rows_count_nowhere(name):
    criterion, formula = CASES[name]
    logits, labels = _batch()
    kept = labels.clone()
    kept[2] = -100
    poisoned = logits.clone()
    poisoned[2] = torch.nan
    poisoned.requires_grad_()
    out = criterion.weigh(poisoned, kept)
    rows = torch.arange(B) != 2
    expected = formula(logits.softmax(1), labels)[rows].mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.sample_weight[2] == 0
    assert out.sample_loss[2] == 0
    out.loss.backward()
    assert poisoned.grad[2].abs().sum() == 0
    assert torch.isfinite(poisoned.grad).all()


def test_a_batch_of_ignored_rows_has_loss_0():
    for criterion, _ in CASES.values():
        assert criterion(torch.randn(3, C), torch.full((3,), -100)).item() == 0


def test_the_trust_in_a_label():
    confident = torch.tensor([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])  # the second contradicts the student
    for name, (criterion, _) in CASES.items():
        right, wrong = criterion.weigh(confident, labels).sample_weight.tolist()
        assert 0 <= wrong < right <= 1, name
    noise_layer = NoiseLayer(C, epsilon=0.4)
    p, q = confident.softmax(1), noise_layer.transition_logits.softmax(1).double()
    posterior = p[:, 0] * q[0, 0] / (p @ q)[:, 0]
    assert torch.allclose(
        noise_layer.weigh(confident, labels).sample_weight.double(), posterior, rtol=1e-5
    )
    gce = GeneralisedCrossEntropy(q=0.7).weigh(confident, labels).sample_weight
    assert torch.allclose(gce, p[:, 0] ** 0.7)


def test_the_noise_layer_learns_the_noise():
    """On labels flipped by a known matrix, under a student that knows the truth."""
    torch.manual_seed(0)
    truth = torch.randint(3, (4000,))
    flip = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.8, 0.2], [0.1, 0.0, 0.9]])
    given = flip[truth].multinomial(1).squeeze(1)
    logits = 20 * torch.eye(3)[truth]
    layer = NoiseLayer(3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        layer(logits, given).backward()
        optimizer.step()
    assert (layer.transition_logits.softmax(1) - flip).abs().max() < 0.05


def test_eval_mode_is_cross_entropy():
    logits, labels = _batch()
    plain = torch.nn.functional.cross_entropy(logits, labels)
    for criterion, _ in CASES.values():
        criterion.eval()
        assert torch.equal(criterion(logits, labels), plain)
        criterion.train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bootstrap("soft", beta=1.5), "beta"),
        (lambda: NoiseLayer(1), "2 classes"),
        (lambda: NoiseLayer(3, epsilon=1.0), "epsilon"),
        (lambda: GeneralisedCrossEntropy(q=0.0), "q must be"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_full_is_plain_cross_entropy():
    logits, labels = _batch()
    full = Reweight("uniform", burn_in=0.0)
    assert full(logits, labels).item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item()
    )


def _gradients(criterion, rows):
    """Of the logits and of what the criterion learns; one row of the batch is ignored."""
    logits, labels = _batch()
    labels[1] = -100
    leaf = logits[rows].requires_grad_()
    criterion(leaf, labels[rows]).backward()
    own = {name: p.grad for name, p in criterion.named_parameters()}
    return {"logits": leaf.grad.contiguous(), **own}


def be_a_rank():
    with distributed("cpu") as world:
        rows = slice(0, 3) if world.rank == 0 else slice(3, B)  # 2 and 4 valid rows
        return _gradients(NoiseLayer(C, group=dist.group.WORLD), rows)


def test_the_mean_is_over_the_rows_of_all_ranks(ranks):
    first, second = ranks(be_a_rank).results()
    whole = _gradients(NoiseLayer(C), slice(None))
    # Averaging over the ranks is what DDP does, and the engine with the criterion's own.
    of_logits = torch.cat([first["logits"], second["logits"]]) / 2
    assert torch.allclose(of_logits, whole["logits"], rtol=1e-5)
    own = (first["transition_logits"] + second["transition_logits"]) / 2
    assert torch.allclose(own, whole["transition_logits"], rtol=1e-4, atol=1e-7)
