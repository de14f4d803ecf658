"""StableAdamW against the published update written out tensor by tensor; AdamW against torch's."""

import pytest
import torch

from megatron_ettin import distributed
from megatron_ettin.training.adamw import AdamW, StableAdamW, TensorStatistics
from megatron_ettin.training.block_optimizer import BLOCK_ELEMENTS

LR, DECAY, BETAS, EPS = 0.02, 0.01, (0.9, 0.98), 1e-6


def reference_step(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: int,
    lr: float,
    decay: float,
) -> None:
    """Update one whole tensor, float64, as optimi's StableAdamW does (ModernBERT's optimizer)."""
    beta1, beta2 = ((beta**step - beta) / (beta**step - 1) for beta in BETAS)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    rms = (g**2 / torch.maximum(v, torch.tensor(EPS**2))).mean().sqrt()
    rate = lr / max(1.0, float(rms))
    p.mul_(1 - rate / LR * decay)
    p.sub_(rate * m / (v.sqrt() + EPS))


@pytest.mark.usefixtures("one_process")
def test_fifty_steps_equal_the_reference() -> None:
    torch.manual_seed(0)
    # The second tensor is longer than a block.
    starts = [torch.randn(7, 5), torch.randn(600, 500), torch.randn(6)]
    assert starts[1].numel() > BLOCK_ELEMENTS["cpu"]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    # The first tensor is held in two shards, as the distributed optimizer holds them.
    shards = [params[0].data.view(-1)[:13], params[0].data.view(-1)[13:]]
    shards = [torch.nn.Parameter(shard) for shard in shards]
    groups = [
        {"params": [*shards, params[1]], "wd_mult": 1.0},
        {"params": [params[2]], "wd_mult": 0.0},
    ]
    optimizer = StableAdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    held = [*shards, params[1], params[2]]
    optimizer.statistics = TensorStatistics(
        tensor_index={id(p): index for p, index in zip(held, (0, 0, 1, 2), strict=True)},
        counted={id(p): True for p in held},
        numel=torch.tensor([35.0, 300_000.0, 6.0], dtype=torch.float64),
        group=distributed.world_group(),
    )
    expected = [start.double() for start in starts]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    damped = 0
    for step in range(1, 51):
        scale = 30.0 if step % 7 == 0 else 1.0  # spikes, so that the damping acts
        gradients = [torch.randn_like(start) * scale for start in starts]
        flat = gradients[0].view(-1)
        for p, g in zip(held, (flat[:13], flat[13:], *gradients[1:]), strict=True):
            p.grad = g.clone()
        lr = LR * min(1.0, step / 10)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for i, (p, g) in enumerate(zip(expected, gradients, strict=True)):
            before = p.clone()
            decay = 0.0 if i == 2 else DECAY
            reference_step(p, g.double(), *moments[i], step, lr, decay)
            damped += int((p - before).abs().max() < lr / 2)
        for p, whole in zip(expected, params, strict=True):
            torch.testing.assert_close(whole.data.double(), p, rtol=2e-6, atol=2e-6)
    assert damped > 0, "the gradients never triggered the damping"
    assert {group["step"] for group in optimizer.param_groups} == {50}


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(7, 5), torch.randn(600, 500), torch.randn(6)]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    optimizer = AdamW(
        [{"params": ours[:2], "wd_mult": 1.0}, {"params": ours[2:], "wd_mult": 0.0}], **settings
    )
    reference = torch.optim.AdamW(
        [{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}], **settings
    )
    for step in range(50):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * (30.0 if step % 7 == 0 else 1.0)
            q.grad = p.grad.clone()
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = LR * min(1.0, step / 10)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert not torch.allclose(ours[0], starts[0], atol=0.1)


@pytest.mark.usefixtures("one_process")
def test_replicas_that_are_not_counted_do_not_change_the_statistic() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = StableAdamW(
        [{"params": [p], "wd_mult": 0.0}], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0
    )
    optimizer.statistics = TensorStatistics(
        tensor_index={id(p): 0},
        counted={id(p): False},
        numel=torch.tensor([4.0], dtype=torch.float64),
        group=distributed.world_group(),
    )
    p.grad = torch.full((4,), 2.0)
    optimizer.step()
    # First step: m / sqrt(v) is the gradient's sign, and nothing is damped.
    torch.testing.assert_close(p.data, torch.full((4,), 1.0 - LR), rtol=1e-5, atol=0.0)


@pytest.mark.usefixtures("one_process")
def test_which_tensors_are_damped_follows_the_gradients_there_are() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(5), torch.randn(7), torch.randn(3)]
    held = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = StableAdamW(
        [{"params": held, "wd_mult": 1.0}], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    optimizer.statistics = TensorStatistics(
        tensor_index={id(p): index for index, p in enumerate(held)},
        counted={id(p): True for p in held},
        numel=torch.tensor([5.0, 7.0, 3.0], dtype=torch.float64),
        group=distributed.world_group(),
    )
    expected = [start.double() for start in starts]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    everywhere, without_second = {0, 1, 2}, {0, 2}
    for step, present in enumerate([everywhere, without_second, everywhere, everywhere], start=1):
        for i, p in enumerate(held):
            # Later spikes, so that the damping acts.
            p.grad = torch.randn_like(p) * 30.0 ** (step - 1) if i in present else None
            if p.grad is not None:
                reference_step(expected[i], p.grad.double(), *moments[i], step, LR, DECAY)
        optimizer.step()
        for p, q in zip(held, expected, strict=True):
            torch.testing.assert_close(p.data.double(), q, rtol=2e-6, atol=2e-6)
