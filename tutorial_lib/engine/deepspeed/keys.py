"""Keys of a DeepSpeed JSON file: the kind of each value, old names, and values that this package cannot train with.

A test compares these tables with the installed DeepSpeed's own.

Source of the key names: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

from typing import Any


def _kinds(text: str) -> dict[str, str]:
    """Parse a table of ``key:kind`` pairs; a kind that ends in ``?`` may be null."""
    return dict(entry.split(":") for entry in text.split())


TOP_LEVEL_KEYS = _kinds(
    "train_batch_size:int train_micro_batch_size_per_gpu:int gradient_accumulation_steps:int "
    "managed_gradient_accumulation:bool gradient_clipping:float prescale_gradients:bool "
    "gradient_predivide_factor:float gradient_allreduce_op:str communication_data_type:str? "
    "steps_per_print:int? wall_clock_breakdown:bool memory_breakdown:bool dump_state:bool disable_python_gc:bool "
    "disable_allgather:bool log_level:str? "
    "zero_optimization:section zero_allow_untested_optimizer:bool zero_force_ds_cpu_optimizer:bool optimizer:section "
    "bf16:section fp16:section data_types:section torch_autocast:section tensor_parallel:section "
    "activation_checkpointing:section checkpoint:section comms_logger:section flops_profiler:section aio:section "
    "timers:section compile:section tensorboard:section wandb:section csv_monitor:section comet:section"
)

SECTION_KEYS: dict[str, dict[str, str]] = {
    "zero_optimization": _kinds(
        "stage:int contiguous_gradients:bool reduce_scatter:bool reduce_bucket_size:int "
        "use_multi_rank_bucket_allreduce:bool allgather_partitions:bool allgather_bucket_size:int overlap_comm:bool? "
        "compute_grad_norm:bool load_from_fp32_weights:bool elastic_checkpoint:bool offload_param:section? "
        "offload_optimizer:section? zenflow:section? sub_group_size:int round_robin_gradients:bool "
        "stage3_prefetch_bucket_size:int stage3_param_persistence_threshold:int stage3_model_persistence_threshold:int "
        "stage3_max_live_parameters:int stage3_max_reuse_distance:int stage3_gather_16bit_weights_on_model_save:bool "
        "stage3_module_granularity_threshold:int stage3_use_all_reduce_for_fetch_params:bool "
        "stage3_allgather_sequential:bool ignore_unused_parameters:bool legacy_stage1:bool parameter_alignment:bool "
        "zero_hpz_partition_size:int zero_quantized_weights:bool zero_quantized_nontrainable_weights:bool "
        "zero_quantized_gradients:bool memory_efficient_linear:bool pipeline_loading_checkpoint:bool "
        "override_module_apply:bool log_trace_cache_warnings:bool enable_sanity_checks:bool "
        "save_muon_momentum_buffer_in_memory:bool leaf_module:section "
        "cpu_offload:bool? cpu_offload_param:bool? cpu_offload_use_pin_memory:bool? "
        "stage3_gather_fp16_weights_on_model_save:bool"
    ),
    "zero_optimization.offload_optimizer": _kinds(
        "device:str nvme_path:str? buffer_count:int pin_memory:bool pipeline_read:bool pipeline_write:bool "
        "fast_init:bool ratio:float super_offload:bool cpuadam_cores_perc:float"
    ),
    "zero_optimization.offload_param": _kinds(
        "device:str nvme_path:str? buffer_count:int buffer_size:int max_in_cpu:int pin_memory:bool"
    ),
    "zero_optimization.leaf_module": _kinds("classes:list names:list name_suffixes:list"),
    "bf16": _kinds(
        "enabled:bool immediate_grad_update:bool check_grad_overflow:bool bf16_master_weights_and_grads:bool "
        "bf16_optimizer_states:bool"
    ),
    "fp16": _kinds(
        "enabled:bool auto_cast:bool loss_scale:float initial_scale_power:int loss_scale_window:int hysteresis:int "
        "consecutive_hysteresis:bool min_loss_scale:int fp16_master_weights_and_grads:bool"
    ),
    "data_types": _kinds("grad_accum_dtype:str? param_dtype:str? buffer_dtype:str? keep_in_fp32_modules:list"),
    "optimizer": _kinds("type:str params:section legacy_fusion:bool"),
    "optimizer.params": _kinds(
        "lr:float betas:any eps:float weight_decay:float adam_w_mode:bool torch_adam:bool amsgrad:bool "
        "bias_correction:bool"
    ),
    "tensor_parallel": _kinds(
        "dtype:any autotp_size:int tp_overlap_comm:bool vocab_parallel_lm_head:any vocab_parallel_ce_backend:any "
        "tp:any injection_policy_tuple:any partition_config:any preset_model:str? keep_module_on_host:bool "
        "kernel_inject:bool"
    ),
    "torch_autocast": _kinds("enabled:bool dtype:str lower_precision_safe_modules:list"),
    "comms_logger": _kinds("enabled:bool prof_all:bool prof_ops:list verbose:bool debug:bool"),
    "csv_monitor": _kinds("enabled:bool output_path:str job_name:str"),
    "tensorboard": _kinds("enabled:bool output_path:str job_name:str"),
    "wandb": _kinds("enabled:bool group:str? team:str? project:str"),
    "comet": _kinds(
        "enabled:bool samples_log_interval:int project:str? workspace:str? api_key:str? experiment_name:str? "
        "experiment_key:str? online:bool? mode:str?"
    ),
    "timers": _kinds("throughput:section"),
    "timers.throughput": _kinds("enabled:bool synchronized:bool"),
    "compile": _kinds(
        "deepcompile:bool autoep_non_moe:bool free_activation:bool free_activation_threshold:int "
        "offload_activation:bool offload_activation_pin_memory:bool offload_opt_states:bool double_buffer:bool "
        "symmetric_memory:bool debug_log:bool offload_parameters:bool sync_before_reduce:bool sync_after_reduce:bool "
        "sync_before_allgather:bool sync_after_allgather:bool keep_int_input_tensors:bool keep_all_input_tensors:bool "
        "passes:list?"
    ),
    "flops_profiler": _kinds(
        "enabled:bool recompute_fwd_factor:float profile_step:int module_depth:any top_modules:int detailed:bool "
        "output_file:str?"
    ),
    "checkpoint": _kinds(
        "tag_validation:str load_universal:bool use_node_local_storage:bool parallel_write:section "
        "checkpoint_serialization:bool writer:section?"
    ),
}

RENAMED = {
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}
"""Old key names that DeepSpeed still accepts, and their current names."""

OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Old switches in ``zero_optimization``, and the sections that replaced them."""

OTHER_LAYOUT = "checkpoints would have files that can neither be resumed nor exported here"
_OURS = "this package writes and reads checkpoints itself, so it would have no effect"

ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "zero_optimization.elastic_checkpoint": (False, OTHER_LAYOUT),
    "zero_optimization.zenflow": (None, "it swaps in a different optimizer, which checkpoints here cannot store"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed has removed that implementation"),
    "zero_optimization.stage3_module_granularity_threshold": (
        0,
        "DeepSpeed's first step then fails with 'unknown parameter type'",
    ),
    "zero_optimization.compute_grad_norm": (True, "every step reports the gradient's norm, and clips by it"),
    "zero_optimization.offload_optimizer.super_offload": (
        False,
        "it swaps in a different optimizer, which checkpoints here cannot store",
    ),
    "zero_optimization.offload_optimizer.ratio": (
        1.0,
        "part of the states would stay on the device, under a different optimizer, which checkpoints here cannot store",
    ),
    "optimizer.legacy_fusion": (False, "in 16 bits it picks another optimizer, which checkpoints here cannot store"),
    "optimizer.params.adam_w_mode": (True, "weight decay is decoupled here (AdamW), not added to the gradient (Adam)"),
    "optimizer.params.torch_adam": (True, "this package trains with PyTorch's AdamW"),
    "optimizer.params.amsgrad": (False, "this package trains with AdamW without the AMSGrad variant"),
    "optimizer.params.bias_correction": (True, "this package's AdamW corrects its moments' bias"),
    "checkpoint.load_universal": (False, "a run resumes from its own checkpoints, which have a different layout"),
    "checkpoint.use_node_local_storage": (False, OTHER_LAYOUT),
    "checkpoint.parallel_write": ({}, _OURS),
    "checkpoint.checkpoint_serialization": (True, _OURS),
    "checkpoint.writer": (None, _OURS),
    "managed_gradient_accumulation": (True, "the training loop here leaves accumulation to DeepSpeed"),
    "gradient_allreduce_op": ("mean", "the loss is scaled here for gradients that are averaged over the ranks"),
    "tensor_parallel.dtype": (None, "DeepSpeed expects a Python object there; the setting precision decides"),
    "tensor_parallel.vocab_parallel_lm_head": (False, "a rank would only see its share of the logits"),
}
"""The only value that a key may have here, and why. Other values are refused before the first step."""

CHOICES = {
    "checkpoint.tag_validation": ("Warn", "Ignore", "Fail"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
}
"""Words that a key may be set to, in upper or lower case."""

ABOVE_0 = ("steps_per_print", "gradient_predivide_factor")
"""Keys whose numbers DeepSpeed divides by, so they must be above 0."""

AT_MOST_1 = ("zero_optimization.offload_optimizer.cpuadam_cores_perc",)
"""Keys whose numbers are fractions, from 0 to 1."""

LISTS_OF_STRINGS = (
    *(f"zero_optimization.leaf_module.{key}" for key in SECTION_KEYS["zero_optimization.leaf_module"]),
    "data_types.keep_in_fp32_modules",
    "torch_autocast.lower_precision_safe_modules",
    "comms_logger.prof_ops",
)

AT_STAGE_3 = ("zero_hpz_partition_size", "sub_group_size",
              *(key for key in SECTION_KEYS["zero_optimization"] if key.startswith("stage3_")))  # fmt: skip
"""Keys in ``zero_optimization`` that DeepSpeed reads at stage 3 only."""

ON_NVME = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init")
"""Keys of an offload section that DeepSpeed reads for NVMe disks only."""

ON_GPUS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""DeepSpeed's monitors, and the module that each of them imports when a run starts."""

WRITES_INTO = ("csv_monitor", "tensorboard")
"""Monitors that create a directory, ``output_path/job_name``, when a run starts."""

DTYPES = {"fp32": ("fp32", "float32", "float", "torch.float32"), "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
          "fp16": ("fp16", "float16", "half", "torch.float16")}  # fmt: skip
