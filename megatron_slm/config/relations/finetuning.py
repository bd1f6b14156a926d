"""Relations of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.schema import RunConfig
from megatron_slm.config.selection import mask_name_problem


def examples(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse settings that do not apply to packed examples, and loss masks without --objective sft."""
    data, name = config.data, config.data.slm_loss_mask
    if config.objective.objective != "sft":
        if name is not None:
            yield f"--slm-loss-mask {name} has no effect without --objective sft. Add it, or leave --slm-loss-mask out."
        return
    if data.mock_data:
        yield "--objective sft needs a corpus of tools/preprocess_sft.py: mock data have no answers. Give --data-path."
    if data.eod_mask_loss:
        yield "--eod-mask-loss has no effect with --objective sft, whose loss masks are files. Leave it out."
    if data.slm_sentences != "refuse":
        yield f"--slm-sentences {data.slm_sentences} has no effect with --objective sft. Leave it out."
    if config.model.mtp_num_layers is not None:
        yield (
            "--mtp-num-layers is not supported with --objective sft: MTP heads would predict tokens of the next "
            "example. Leave it out."
        )
    if name is not None and (problem := mask_name_problem(name)) is not None:
        yield problem


RELATIONS = (examples,)
