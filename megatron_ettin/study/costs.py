"""Costs of a study's stages on its device: timed on this machine where that is the device.

Training: floating-point operations over the device's peak and the share of it that is reached
(`estimate.throughput`); a CPU's peak is measured. Evaluation: a model of the same shape with
random weights is timed for a second, forward and backward, times the tokens that a task needs.

No GPU has run its code for GPUs yet.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megatron_ettin.checkpoint import RunState, SavedModel
from megatron_ettin.config import (
    FIRST_ROTARY_BASES,
    HardwareConfig,
    RunConfig,
    with_rotary_bases,
)
from megatron_ettin.data.tokenize import load_tokenizer
from megatron_ettin.devices import GPUS, Device, measured_peak_flops
from megatron_ettin.estimate.plan import estimate
from megatron_ettin.estimate.throughput import tokens_per_second
from megatron_ettin.evaluation.model import Model
from megatron_ettin.evaluation.rates import Rates, measure_rates
from megatron_ettin.evaluation.tasks.task import Task
from megatron_ettin.export.architecture import (
    huggingface_config,
    kind_of,
    read_huggingface_config,
)
from megatron_ettin.export.tokenizer import special_ids, write_tokenizer
from megatron_ettin.study.arms import Study, StudyModel
from megatron_ettin.study.machine import threads_of_worker
from megatron_ettin.study.training import training_config

#: Start of a training's processes, its last held-out loss and save.
START_SECONDS = 25.0
#: Share of the slots that best-fit packing fills in small corpora.
FILL = 0.98
#: Families that read hidden states; all others compute logits.
HIDDEN_FAMILIES = ("classification", "retrieval")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Estimate of a stage."""

    seconds: float
    num_bytes: int = 0
    """Bytes that it leaves on disk."""


class Costs:
    """Estimates of a study's trainings and evaluations."""

    def __init__(self, study: Study, scratch: Path) -> None:
        """Take an empty folder for descriptions of models that are not trained yet."""
        self._study, self._scratch = study, scratch
        self._models: dict[str, Model] = {}
        self._rates: dict[tuple[str, str, bool], Rates] = {}

    @property
    def is_measured(self) -> bool:
        """True if the device of the study is in this machine."""
        return self._study.config.device == "cpu" or torch.cuda.is_available()

    @cached_property
    def _device(self) -> Device:
        name = self._study.config.device
        if name != "cpu":
            return GPUS[name]
        peak = measured_peak_flops()
        return Device(
            name=f"this machine's {os.cpu_count()} cores",
            kind="cpu",
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            peak_flops={"bf16": peak, "fp32": peak},
            runtime_bytes=0,
        )

    def training(self, config: RunConfig, done_share: float) -> Cost:
        """Estimate a run of which a share has been done.

        Raises:
            EstimateError: it does not fit on the device.
        """
        estimated = estimate(
            config, self._device, num_devices=self._study.config.num_devices, fill=FILL
        )
        seconds = 3600.0 * estimated.hours
        every = config.validation.every_tokens
        if config.data.validation and every:
            measured_tokens = config.validation.num_rows * config.validation.seq_length
            # A forward pass is a third of a forward and a backward one.
            seconds *= 1.0 + measured_tokens / (3.0 * every)
        disk = estimated.checkpoints * estimated.checkpoint_bytes
        left = 1.0 - done_share
        return Cost(seconds=START_SECONDS + left * seconds, num_bytes=round(left * disk))

    def task_seconds(self, model: StudyModel, task: Task) -> float:
        """Estimate the measurement of a model in a task with one seed."""
        described = self.describe(model)
        work = task.work(described)
        rates = self._rates_of(model, described, task.family not in HIDDEN_FAMILIES)
        return (
            work.fixed_seconds
            + work.forward_tokens / rates.forward
            + work.trained_tokens / rates.training
        )

    def describe(self, model: StudyModel) -> Model:
        """Return the model; before it is trained, one with its settings and no weights."""
        if model.name not in self._models:
            there = model.run is None or Path(model.source).is_dir()
            self._models[model.name] = model.open() if there else self._described(model)
        return self._models[model.name]

    def _rates_of(self, model: StudyModel, described: Model, with_output_layer: bool) -> Rates:
        key = (model.size, described.attention, with_output_layer)
        if key not in self._rates:
            self._rates[key] = (
                self._measured_rates(described, with_output_layer)
                if self.is_measured
                else self._estimated_rates(described)
            )
        return self._rates[key]

    def _measured_rates(self, described: Model, with_output_layer: bool) -> Rates:
        before = torch.get_num_threads()
        torch.set_num_threads(threads_of_worker(self._study.config.num_devices))
        try:
            return measure_rates(described, with_output_layer=with_output_layer)
        finally:
            torch.set_num_threads(before)

    def _estimated_rates(self, described: Model) -> Rates:
        """Return the rates that training would reach on the device, on one of its ranks."""
        saved = read_huggingface_config(described.folder, None, None)
        training = tokens_per_second(
            saved.model,
            saved.attention,
            HardwareConfig(precision="fp32"),  # as evaluation loads models
            self._device,
            world_size=1,
            seq_length=described.max_tokens,
            scored_share=1.0,
            fill=FILL,
            micro_batches=1,
        )
        return Rates(forward=3.0 * training, training=training)

    def _described(self, model: StudyModel) -> Model:
        config = training_config(self._study, model)
        filled = with_rotary_bases(config.phases, FIRST_ROTARY_BASES, {})
        config = dataclasses.replace(config, phases=filled)
        saved = SavedModel.of_run(config, RunState(phase=config.phases[-1].name))
        tokenizer = load_tokenizer(Path(config.data.tokenizer))
        kind = kind_of(saved.attention)
        described = huggingface_config(saved, special_ids(tokenizer, saved.model.vocab_size))
        described.architectures = [kind.model_class.__name__]
        folder = self._scratch / model.name
        folder.mkdir(parents=True)
        described.save_pretrained(folder)
        write_tokenizer(
            tokenizer, folder, architecture=kind.architecture, max_length=saved.max_seq_length
        )
        return Model(
            folder=folder,
            name=model.name,
            attention=saved.attention,
            prediction_shift=1 if saved.attention == "causal" else saved.prediction_shift,
            max_tokens=saved.max_seq_length,
        )
