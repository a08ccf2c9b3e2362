"""The optimizer's float32 main parameters and the model's, made equal after a load.

Weights in FP8 are rounded hard, so it matters which of the two is made from the other and where from: main
parameters from the weights as they stand in the file, never from weights that were quantized on the way; and
the model's weights from main parameters that were loaded, as an optimizer step makes them.
Invariant: nothing here rounds a main parameter.
"""

from __future__ import annotations

from typing import Any

from megatron_tokedit.engine.extra_state import Chunks


def reload_main_parameters(optimizer: Any, model: list[Any], loaded: Chunks, names: list[str]) -> None:
    """Set main parameters to weights that were loaded without an optimizer.

    Args:
        optimizer: from ``build_optimizer``.
        model: its model, from ``build_model``.
        loaded: the loaded state of each chunk of the model, tensors in the precision of the file.
        names: of the chunks in ``loaded``, in the model's order.
    """
    from megatron_tokedit.engine.model import unwrap

    of_parameter = {
        parameter: loaded[name][key]
        for name, chunk in zip(names, model, strict=True)
        for key, parameter in unwrap(chunk).named_parameters()
    }
    for part in optimizer.chained_optimizers:
        if not hasattr(part, "_build_model_param_to_state_dict_param_map"):  # not the distributed optimizer
            part.reload_model_params()
            continue
        # megatron-core's own map takes weight1 of an expert for weight10
        part._build_model_param_to_state_dict_param_map = lambda state_dict: of_parameter
        try:
            part.reload_model_params(state_dict=loaded)
        finally:
            del part._build_model_param_to_state_dict_param_map


def refresh_weights(optimizer: Any, model: list[Any]) -> None:
    """Make the model's weights from the main parameters, as the end of an optimizer step does it.

    Collective over the data-parallel ranks.
    """
    for part in optimizer.chained_optimizers:
        if hasattr(part, "_copy_main_params_to_model_params") and not part.is_stub_optimizer:
            part._copy_main_params_to_model_params()
    for chunk in model:
        # where the gathering overlaps, the next forward pass begins with it
        if chunk.ddp_config.use_distributed_optimizer and not chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()
