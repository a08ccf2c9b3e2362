"""Checks of supervised fine-tuning: what goes with stage ``sft``, and what only with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.data import DataConfig
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.model import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.config.sft import SftConfig
from megatron_tokedit.config.training import TrainingConfig

_ONLY_SFT = "is for stage sft, and the stage is {}; remove it"


def _length(stage: str, training: TrainingConfig, data: DataConfig) -> Iterator[Fault]:
    """A run is as long as its steps or, in stage ``sft``, as its epochs."""
    by_source = [index for index, source in enumerate(data.train) if source.epochs is not None]
    if stage != "sft":
        if training.train_epochs is not None:
            yield Fault(("training", "train_epochs"), _ONLY_SFT.format(stage))
        for index in by_source:
            yield Fault(("data", "train", index, "epochs"), _ONLY_SFT.format(stage))
    elif by_source and training.train_epochs is None:
        for index, source in enumerate(data.train):
            if source.epochs is None:
                yield Fault(
                    ("data", "train", index, "epochs"),
                    f"missing: data.train.{by_source[0]} has epochs; give this source some too, or "
                    f"training.train_epochs for all that have none",
                )
    if not training.train_steps and (stage != "sft" or not (by_source or training.train_epochs)):
        instead = ", or train_epochs" if stage == "sft" else ""
        yield Fault(("training", "train_steps"), f"missing, and it has no default; give a number{instead}")


def _shares(stage: str, training: TrainingConfig, data: DataConfig) -> Iterator[Fault]:
    """Conversations are shared out by epochs, by weights, or as many as there are."""
    if stage != "sft":
        return
    by_epochs = training.train_epochs is not None or any(source.epochs is not None for source in data.train)
    weighted = [index for index, source in enumerate(data.train) if source.weight is not None]
    for index, source in enumerate(data.train):
        if source.tokens is not None:
            yield Fault(
                ("data", "train", index, "tokens"),
                "a budget of tokens is for pretraining; in stage sft give epochs, or a weight",
            )
        if source.weight is not None and by_epochs:
            yield Fault(
                ("data", "train", index, "weight"),
                f"{source.weight:g} beside epochs: how often a source is drawn is given twice; remove it, or "
                f"give training.train_steps instead of epochs",
            )
        elif source.weight is None and weighted and source.tokens is None:
            yield Fault(
                ("data", "train", index, "weight"),
                f"missing: data.train.{weighted[0]} has a weight; in stage sft give all sources one, or none "
                f"(then every conversation is drawn equally often)",
            )


def _validation_epochs(data: DataConfig) -> Iterator[Fault]:
    for index, source in enumerate(data.validation):
        if source.epochs is not None:
            yield Fault(
                ("data", "validation", index, "epochs"),
                f"got {source.epochs:g}, but a validation source is measured at most once over; remove it",
            )


def _idle_settings(stage: str, sft: SftConfig, data: DataConfig) -> Iterator[Fault]:
    """What the stage makes no use of."""
    if stage != "sft":
        for field, value in sft:
            if value != SftConfig.model_fields[field].default:
                yield Fault(("sft", field), _ONLY_SFT.format(stage))
        return
    for field, instead in (
        ("eod_mask_loss", "what counts in the loss is in the dataset's mask"),
        ("reset_position_ids", "conversations are always apart"),
        ("reset_attention_mask", "conversations are always apart"),
    ):
        if getattr(data, field):
            yield Fault(("data", field), f"has no effect in stage sft: {instead}; remove it")


def _packing(
    stage: str, sft: SftConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> Iterator[Fault]:
    """What cannot work on rows of several conversations."""
    if stage != "sft" or not sft.packing:
        return
    if parallel.context_parallel_size > 1:
        yield Fault(
            ("parallel", "context_parallel_size"),
            f"{parallel.context_parallel_size} ranks would each need an equal part of every conversation of "
            f"a packed row; set it to 1, or sft.packing: false",
        )
    if precision.cuda_graph_impl != "none":
        yield Fault(
            ("precision", "cuda_graph_impl"),
            f"{precision.cuda_graph_impl} graphs do not take packed rows, whose borders change from row to "
            f"row; remove it, or set sft.packing: false",
        )


def _router_losses(stage: str, model: ModelConfig) -> Iterator[Fault]:
    """megatron-core weighs a router's loss by all tokens, and divides it by those that count in the loss.

    In pre-training these are the same; here the router's losses would grow as responses get shorter.
    """
    if stage != "sft" or not model.family_traits.has_experts:
        return
    for field, off in (("moe_aux_loss_coeff", "0"), ("moe_z_loss_coeff", "null")):
        if value := getattr(model, field):
            yield Fault(
                ("model", field),
                f"{value:g}: in stage sft megatron-core would weigh it by prompts and padding too and divide "
                f"by response tokens, so that it depends on the data; set it to {off}",
            )


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _length,
    _shares,
    _validation_epochs,
    _idle_settings,
    _packing,
    _router_losses,
)
