"""Checkpoints: three formats in, one out.

    format      config.json                    HR projections        vision tower
    flexattn    model_type flexattn_llava      in the checkpoint     in the checkpoint
    llava       model_type llava               start as `hr_init`    in the checkpoint
    released    model_type llava_llama         in the checkpoint     in the checkpoint, or named by mm_vision_tower

A checkpoint may be loaded as a system other than its own (`FlexAttnConfig.system`); what that system needs beyond the
checkpoint starts as `hr_init` says.

    locate         a folder, or the files of a hub repository that are needed
    files          JSON files, links that leave a folder, errors in one line
    config         config.json of any format, checked
    released       the released format: names, configuration, vision tower
    generation     generation_config.json, checked
    weights        weights of any format, loaded into the model
    quantisation   what is quantised as it is loaded
    hub_files      the line of code and the model card beside a saved checkpoint
    projections    how HR projections start if a checkpoint lacks them
"""

from flexattn_cuda.checkpoints.config import checkpoint_format, load_config
from flexattn_cuda.checkpoints.hub_files import AUTO_MAP, write_hub_files
from flexattn_cuda.checkpoints.locate import HubOptions, Part, resolve_folder
from flexattn_cuda.checkpoints.released import vision_tower_folder
from flexattn_cuda.checkpoints.weights import check_finite, load_weights, register_key_conversion

__all__ = [
    "AUTO_MAP",
    "HubOptions",
    "Part",
    "check_finite",
    "checkpoint_format",
    "load_config",
    "load_weights",
    "register_key_conversion",
    "resolve_folder",
    "vision_tower_folder",
    "write_hub_files",
]
