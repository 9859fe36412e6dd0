"""Formulas against published tables, DeepSpeed's own estimators, and traffic measured with DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import pytest

from tutorial_lib.theory import activations, flops, memory, traffic
from tutorial_lib.theory.memory import DEEPSPEED_FP32, FP32, MIXED, Precision, model_states

GB = 10**9


# --- model states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "published"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(stage: int, published: float) -> None:
    """arXiv:1910.02054, figure 1: 7.5 B parameters on 64 ranks, in GB of 10^9 bytes."""
    assert round(model_states(7_500_000_000, stage, 64).total / GB, 1) == published


@pytest.mark.parametrize(
    ("stage", "mixed", "fp32"),
    [
        (0, (2, 2, 12), (4, 4, 8)),
        (1, (2, 2, 12 / 8), (4, 4, 8 / 8)),
        (2, (2, 2 / 8, 12 / 8), (4, 4 / 8, 8 / 8)),
        (3, (2 / 8, 2 / 8, 12 / 8), (4 / 8, 4 / 8, 8 / 8)),
    ],
)
def test_each_stage_divides_what_it_says(stage: int, mixed: tuple[float, ...], fp32: tuple[float, ...]) -> None:
    num_params = 8_000
    for precision, per_param in ((MIXED, mixed), (FP32, fp32)):
        states = model_states(num_params, stage, 8, precision)
        assert (states.parameters, states.gradients, states.optimizer) == tuple(num_params * b for b in per_param)
        assert states.total == sum(states.to_dict().values())


@pytest.mark.parametrize(
    ("stage", "precision", "per_parameter"),
    [(0, FP32, 12), (0, MIXED, 14), (1, MIXED, 14), (2, DEEPSPEED_FP32, 16), (3, MIXED, 12), (3, DEEPSPEED_FP32, 12)],
)
def test_a_checkpoint_holds_each_state_once(stage: int, precision: Precision, per_parameter: int) -> None:
    """``make bench`` and ``tests/distributed`` compare it with files."""
    assert memory.checkpoint_bytes(1_000, stage, precision) == 1_000 * per_parameter
    with pytest.raises(ValueError, match="stage is 4"):
        memory.checkpoint_bytes(1_000, 4, precision)


@pytest.mark.parametrize(
    ("num_ranks", "stage_1", "stage_2", "stage_3"), [(2, 1.60, 1.78, 2.0), (4, 2.29, 2.91, 4.0), (8, 2.91, 4.27, 8.0)]
)
def test_savings_depend_on_the_number_of_ranks(num_ranks: int, stage_1: float, stage_2: float, stage_3: float) -> None:
    ratios = [round(memory.savings_ratio(stage, num_ranks), 2) for stage in memory.STAGES]
    assert ratios == [1.0, stage_1, stage_2, stage_3]


def test_the_quoted_4x_and_8x_are_limits() -> None:
    assert memory.savings_ratio(1, 1_000_000) == pytest.approx(4, rel=1e-4)
    assert memory.savings_ratio(2, 1_000_000) == pytest.approx(8, rel=1e-4)


def test_shares_are_padded_to_be_equal() -> None:
    assert memory.partition_elements(10, 4) == 3
    assert memory.partition_elements(10, 4, alignment=2) == 4
    assert memory.partition_elements(12, 4) == 3
    assert memory.partitioned_elements([10, 1, 4], 4) == 3 + 1 + 1
    assert model_states(10, 3, 4, Precision(1, 1, 1)).total == 9


@pytest.mark.parametrize(
    ("stage", "offload", "device", "host"),
    [
        (1, "none", (2, 2, 3), (0, 0, 0)),
        (1, "optimizer", (2, 2, 0), (0, 1, 3)),
        (2, "optimizer", (2, 0, 0), (0, 1, 3)),
        (3, "optimizer", (0.5, 0, 0), (0, 1, 3)),
        (3, "all", (0, 0, 0), (0.5, 1, 3)),
    ],
)
def test_offload_moves_states_to_the_host(
    stage: int, offload: str, device: tuple[float, ...], host: tuple[float, ...]
) -> None:
    arguments = (1000, stage, 4, MIXED, offload)
    assert tuple(memory.device_states(*arguments).to_dict().values()) == tuple(1000 * x for x in device)
    assert tuple(memory.host_states(*arguments).to_dict().values()) == tuple(1000 * x for x in host)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 4, 2), "stage is 4"),
        ((0, 1, 2), "at least 1"),
        ((1000, 0, 2, MIXED, "optimizer"), "needs stage 1, 2 or 3"),
        ((1000, 2, 2, MIXED, "all"), "needs stage 3"),
        ((1000, 2, 2, MIXED, "disk"), "Write one of: none, optimizer, all"),
    ],
)
def test_impossible_states_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.device_states(*arguments)


def test_deepspeed_keeps_a_master_copy_in_fp32() -> None:
    assert DEEPSPEED_FP32.total == FP32.total + 4


# --- DeepSpeed's estimators ------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (8, 1), (4, 2), (3, 5)]


@pytest.mark.parametrize("num_params", [2_851_000_000, 139_840, 7])
def test_estimators_are_deepspeeds(num_params: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    largest = num_params // 5
    for per_node, nodes in SHAPES:
        for offload in (True, False):
            for factor in (1.5, 1.0):
                ours = memory.deepspeed_estimate_zero2(
                    num_params, per_node, nodes, offload_optimizer=offload, buffer_factor=factor
                )
                assert (ours.host, ours.device) == zero2(num_params, per_node, nodes, offload, factor)
        for name, optimizer, parameters in (("none", False, False), ("optimizer", True, False), ("all", True, True)):
            for init in (True, False):
                third = memory.deepspeed_estimate_zero3(
                    num_params, largest, per_node, nodes, offload=name, zero_init=init
                )
                theirs = zero3(num_params, largest, per_node, nodes, optimizer, parameters, init)
                assert (third.host, third.device) == theirs[:2]


def test_estimator_and_paper_differ_for_t5_3b() -> None:
    """2851 M parameters on 8 ranks at stage 2: 11.28 GiB by DeepSpeed's code, 9.96 GiB by the paper."""
    num_params = 2_851_000_000
    estimate = memory.deepspeed_estimate_zero2(num_params, 8, offload_optimizer=False)
    assert round(estimate.device / 2**30, 2) == 11.28
    assert round(model_states(num_params, 2, 8).total / 2**30, 2) == 9.96


def test_estimator_prints_what_we_compute() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_cold as printed

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        printed(2_851_000_000, num_gpus_per_node=8)
    assert "11.28GB | offload_optimizer=none" in out.getvalue()


# --- tensor parallelism, activations ---------------------------------------------------------------------------------


def test_tensor_parallelism_keeps_replicated_parameters_whole() -> None:
    assert memory.tensor_parallel_params(1000, 200, 4) == 200 + 200
    assert memory.tensor_parallel_params(1000, 0, 4) == 250
    assert memory.tensor_parallel_params(1000, 200, 1) == 1000


def test_activations_of_one_layer() -> None:
    """GPT-3's layer (s 2048, h 12288, a 96, t 8), micro-batch 1: arXiv:2205.05198, section 4."""
    s, b, h, a, t = 2048, 1, 12288, 96, 8
    assert activations.megatron_bytes_per_layer(s, b, h, a) == s * b * h * (34 + 80)
    assert activations.megatron_bytes_per_layer(s, b, h, a, t) == s * b * h * (10 + 24 / 8 + 80 / 8)
    parallel = activations.megatron_bytes_per_layer(s, b, h, a, t, sequence_parallel=True)
    assert parallel == activations.megatron_bytes_per_layer(s, b, h, a) / 8


# --- traffic ---------------------------------------------------------------------------------------------------------

PSI = 168_192


@pytest.mark.parametrize(("stage", "multiple"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_volume_per_step_in_the_paper(stage: int, multiple: int) -> None:
    assert traffic.zero_volume(PSI, stage).total == multiple * PSI


@pytest.mark.parametrize(
    ("arguments", "counted"),
    [
        # As counted in steady state on two ranks, DeepSpeed 0.19.8, for a GPT-2 of PSI elements.
        (dict(stage=0, accumulation=3), 2 * PSI),
        (dict(stage=1, gradient_reduction="all_reduce"), 3 * PSI),
        (dict(stage=1, gradient_reduction="all_reduce", accumulation=3), 3 * PSI),
        (dict(stage=2, gradient_reduction="all_reduce", accumulation=3), 7 * PSI),
        (dict(stage=2, accumulation=3), 4 * PSI),
        (dict(stage=3, parameters_stay=True), 2 * PSI),
        (dict(stage=3, parameters_stay=True, accumulation=3), 6 * PSI),
        (dict(stage=3, accumulation=3), 9 * PSI),
        (dict(stage=3, persistent=1792), 2 * 166_400 + 1792 + PSI),
        (dict(stage=3, persistent=1792, accumulation=3), 1_504_768),
        (dict(stage=3, persistent=1792, accumulation=2, parameters_stay=True), 670_976),
    ],
)
def test_volume_as_deepspeed_was_seen_to_send_it(arguments: dict, counted: int) -> None:
    assert traffic.zero_volume(PSI, **arguments).total == counted


def test_tied_embeddings_are_gathered_for_each_use() -> None:
    tied = 32_000
    assert traffic.zero_volume(136_192, 3, tied=tied).to_dict() == {
        "all_reduce": 0,
        "all_gather": 2 * 168_192,
        "reduce_scatter": 136_192,
    }
    assert traffic.zero_volume(136_192, 3, tied=tied, parameters_stay=True).all_gather == 136_192


@pytest.mark.parametrize(
    ("sharding", "multiple"), [("no_shard", 2), ("shard_grad_op", 2), ("full_shard", 3), ("hybrid_shard", 4)]
)
def test_volume_per_step_of_fsdp(sharding: str, multiple: int) -> None:
    """Hybrid over two ranks: the all-reduce of half of Psi is one Psi more."""
    size = 2 if sharding == "hybrid_shard" else None
    assert traffic.fsdp_volume(PSI, sharding, shard_size=size).total == multiple * PSI


def test_fsdp_gathers_per_micro_batch_and_reduces_per_step() -> None:
    assert traffic.fsdp_volume(PSI, "full_shard", accumulation=4).to_dict() == {
        "all_reduce": 0,
        "all_gather": 8 * PSI,
        "reduce_scatter": PSI,
    }
    assert traffic.fsdp_volume(PSI, "no_shard", accumulation=4).total == 2 * PSI
    assert traffic.fsdp_volume(PSI, "full_shard", frozen=PSI).reduce_scatter == 0
    with pytest.raises(ValueError, match="hybrid_shard with its shard_size"):
        traffic.fsdp_volume(PSI, "hybrid_shard")


def test_fsdp_reduces_with_every_micro_batch_by_default() -> None:
    assert traffic.fsdp_volume(PSI, "full_shard", accumulation=4, reduce_each=True).total == 12 * PSI
    assert traffic.fsdp_volume(PSI, "shard_grad_op", accumulation=4, reduce_each=True).total == 8 * PSI
    assert traffic.fsdp_volume(PSI, "no_shard", accumulation=4, reduce_each=True).total == 2 * PSI


def test_a_ring_sends_less_than_the_volume() -> None:
    assert traffic.ring_factor("all_reduce", 2) == 1
    assert traffic.ring_factor("all_gather", 4) == traffic.ring_factor("reduce_scatter", 4) == 0.75
    assert traffic.zero_volume(PSI, 3).ring_elements(4) == 0.75 * 3 * PSI
    assert traffic.zero_volume(PSI, 0).ring_elements(1) == 0
    with pytest.raises(ValueError, match="no ring factor for 'broadcast'"):
        traffic.ring_factor("broadcast", 2)
    with pytest.raises(ValueError, match="at least one rank"):
        traffic.ring_factor("all_reduce", 0)


def test_megatron_all_reduces_four_times_per_layer() -> None:
    bsh = 4 * 128 * 64
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2).to_dict()["all_reduce"] == 2 * 4 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2, recompute=True).all_reduce == 2 * 5 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2, accumulation=3).total == 3 * 2 * 2 * 4 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=2, column_layers=5).all_reduce == 2 * 7 * bsh
    assert traffic.tensor_parallel_volume(2, 4, 128, 64, tp=1).total == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(stage=4), "stage is 4"),
        (dict(stage=1, gradient_reduction="gather"), "Write one of: reduce_scatter, all_reduce"),
        (dict(stage=1, accumulation=0), "accumulation is 0"),
    ],
)
def test_impossible_traffic_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        traffic.zero_volume(PSI, **arguments)


# --- FLOPs and time --------------------------------------------------------------------------------------------------


def test_flops_per_token() -> None:
    assert flops.flops_per_token(1000, 2, 64, 128) == 6 * 1000 + 12 * 2 * 64 * 128


def test_palm_540b_reaches_the_published_mfu() -> None:
    """arXiv:2204.02311, table 3 and section 4.1: 238.3 K tokens/s on 6144 TPU v4 of 275 TFLOP/s are 46.2 % MFU."""
    # Multi-query attention: 118 layers; 48 heads of size 256 make h = 12288 in the attention term.
    per_token = flops.flops_per_token(540_350_000_000, 118, 48 * 256, 2048)
    mfu = flops.utilisation(238_300, per_token, 6144 * 275e12)
    assert mfu == pytest.approx(0.462, abs=0.003)
    assert flops.utilisation(238_300, per_token, 6144 * 275e12, recompute=True) == pytest.approx(mfu * 4 / 3)


def test_flops_agree_with_pytorchs_counter() -> None:
    """PyTorch only counts matrix products: a little less than the formula, which counts norms and biases too."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=500, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    batch = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=batch, labels=batch).loss.backward()
    num_params = sum(p.numel() for p in model.parameters())
    predicted = batch.numel() * flops.flops_per_token(num_params, 2, 64, 64)
    assert 0.90 < counter.get_total_flops() / predicted < 1.0


def test_step_time() -> None:
    time = flops.step_time(
        1_000_000, 4096, 2_000_000, num_devices=4, device_flops=1e12, bandwidth=1e9, bytes_per_element=2
    )
    assert time.compute == 6 * 1e6 * 4096 / 4e12
    assert time.communication == 2e6 * 2 / 1e9
    assert time.bound == "compute" and time.overlapped == time.compute
    assert time.serial == time.compute + time.communication
    recomputed = flops.step_time(1, 1, 0, num_devices=1, device_flops=1, bandwidth=1, recompute=True)
    assert recomputed.compute == 8


def test_data_parallelism_is_compute_bound_above_the_critical_batch() -> None:
    """At the critical number of tokens, backward (4 Psi tokens / FLOP/s) takes as long as the all-reduce."""
    peak, bandwidth, num_params = 400e12, 50e9, 1_000_000
    for size in (2, 4):
        tokens = flops.critical_tokens_per_device(peak, bandwidth, size)
        all_reduce = traffic.zero_volume(num_params, 0).total * size / bandwidth
        assert 4 * num_params * tokens / peak == pytest.approx(all_reduce)


# --- the border ------------------------------------------------------------------------------------------------------


def test_theory_imports_neither_torch_nor_other_rooms() -> None:
    program = (
        "import sys, tutorial_lib.theory.remedies, tutorial_lib.theory.reasons, tutorial_lib.theory.known_models\n"
        "others = [m for m in sys.modules if m.startswith('tutorial_lib.') and '.theory' not in m]\n"
        "assert not others and not {'torch', 'transformers', 'numpy'} & set(sys.modules), others"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
