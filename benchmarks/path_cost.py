"""Cost of Megatron-Core's path over plain PyTorch, part by part of a step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from statistics import median

import torch

from benchmarks.contenders import Ours
from benchmarks.plain_model import PlainModel
from megatron_ettin.config import OptimizerConfig, RunConfig
from megatron_ettin.model.attention import PackedRows
from megatron_ettin.model.linear_cross_entropy import linear_cross_entropy
from megatron_ettin.training.adamw import StableAdamW, TensorStatistics
from megatron_ettin.training.micro_batch import MicroBatch
from megatron_ettin.training.preparation import micro_batches

#: Parts of a step, in order; "step" is the whole step, with the code between the parts.
PARTS = ("layers", "loss", "optimizer", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """Median times of a part."""

    megatron: float
    plain: float

    @property
    def share(self) -> float:
        """Cost of the path beyond plain PyTorch, as a share of plain PyTorch's time."""
        return self.megatron / self.plain - 1.0


class _Path:
    """Both ways through the parts, on one micro-batch."""

    def __init__(self, config: RunConfig) -> None:
        self.ours = Ours(config)
        self.stage, phase = self.ours.run.stage, self.ours.run.config.phases[0]
        self.ours.run.ddp.train()
        self.plain = PlainModel(self.stage, *phase.rotary_bases)
        self.update = _plain_optimizer(self.plain, config.optimizer)
        loader = self.ours.run.loader
        self.batch: MicroBatch = next(micro_batches(loader, 0, phase.global_batch_size))
        slots, width = len(self.batch.tokens), config.model.hidden_size
        self.hidden = torch.randn(slots, width, dtype=self.stage.config.params_dtype)

    def parts(self) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
        """Return the two ways through each part: Megatron-Core's, plain."""
        return {
            "layers": (self._layers, self._plain_layers),
            "loss": (self._loss, self._plain_loss),
            "optimizer": (self.ours.run.optimizer.step, self.update.step),
            # The same rows in every step, as the plain one has.
            "step": (self.ours.step_again, self._plain_step),
        }

    def _packed(self) -> PackedRows:
        # Its own masks, as each micro-batch has.
        dropout = self.stage.output_dropout
        return dataclasses.replace(self.batch.packed, masks={}, dropout=dropout)

    def _layers(self) -> None:
        packed = self._packed()
        hidden = self.stage.decoder(
            hidden_states=self.stage.embedding(self.batch.tokens),
            attention_mask=None,
            rotary_pos_emb=self.stage.rotary.of(packed),
            packed_seq_params=packed,
        )
        torch.autograd.backward(hidden, self.hidden[:, None])

    def _plain_layers(self) -> None:
        hidden = self.plain.hidden_states(self.batch.tokens, self._packed())
        torch.autograd.backward(hidden, self.hidden)

    def _loss(self) -> None:
        hidden = self.hidden[:, None].clone().requires_grad_()
        loss = linear_cross_entropy(
            self.stage.head(hidden.index_select(0, self.batch.scored))[:, 0],
            self.stage.shared_embedding_or_output_weight(),
            self.stage.output_layer.bias,
            self.batch.labels,
            vocab_size=self.stage.model_config.vocab_size,
            group=self.stage.tp_group,
        )
        torch.autograd.backward(loss.total)

    def _plain_loss(self) -> None:
        hidden = self.hidden.clone().requires_grad_()
        torch.autograd.backward(
            self.plain.summed_loss(hidden, self.batch.scored, self.batch.labels)
        )

    def _plain_step(self) -> None:
        batch = self.batch
        torch.autograd.backward(
            self.plain(batch.tokens, self._packed(), batch.scored, batch.labels)
        )
        self.update.step()
        self.update.zero_grad()


def _plain_optimizer(model: PlainModel, config: OptimizerConfig) -> StableAdamW:
    """Return the update alone, without Megatron-Core's optimizer around it."""
    parameters = list(model.parameters())
    optimizer = StableAdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "wd_mult": 1.0},
            {"params": [p for p in parameters if p.dim() <= 1], "wd_mult": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    optimizer.statistics = TensorStatistics(
        tensor_index={id(parameter): index for index, parameter in enumerate(parameters)},
        counted=dict.fromkeys(map(id, parameters), True),
        numel=torch.tensor([p.numel() for p in parameters], dtype=torch.float64),
        group=model.group,
    )
    return optimizer


def path_cost(config: RunConfig, *, rounds: int) -> dict[str, Seconds]:
    """Measure each part of a step of one micro-batch on a CPU, both ways in turns.

    Attention, loss, dropout and update are the same functions both ways, so that what is left is
    Megatron-Core's: layers, schedule, gradient buffers, optimizer.
    """
    # Gradients of random hidden states mean nothing, so the weights must not move.
    still = dataclasses.replace(config.optimizer, lr=1e-12)
    path = _Path(dataclasses.replace(config, optimizer=still))
    taken: dict[str, list[list[float]]] = {part: [[], []] for part in PARTS}
    with closing(path.ours):
        for is_timed in [False] + [True] * rounds:
            for part, ways in path.parts().items():
                for times, way in zip(taken[part], ways, strict=True):
                    begin = time.perf_counter()
                    way()
                    if is_timed:
                        times.append(time.perf_counter() - begin)
    return {
        part: Seconds(megatron=median(ours), plain=median(plain))
        for part, (ours, plain) in taken.items()
    }
