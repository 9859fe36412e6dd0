"""Exercises of lesson 03: FSDP2's memory, its traffic, and a hang."""

from __future__ import annotations

from tutorial_lib.lab.exercises import Exercise, choice, number


def bytes_per_rank(num_params: int, num_ranks: int) -> Exercise:
    """Ask for a rank's model states under full_shard, with fp32 shards and Adam."""
    shard = 16 * num_params / num_ranks
    return Exercise(
        f"A model of {num_params / 1e9:g} billion parameters is trained with `fully_shard` and AdamW on {num_ranks} "
        "GPUs, in bf16 with a `MixedPrecisionPolicy`. How many GB of model states does each GPU hold after backward?",
        check=number(
            shard / 1e9,
            relative=0.01,
            unit="GB",
            near={
                16 * num_params / 1e9: "That is what plain data parallelism holds. Who shares it here?",
                (2 + 2 + 8) * num_params / num_ranks / 1e9: "bf16 is what travels and computes. The shards stay fp32.",
            },
        ),
        hints=[
            "Which precision do the shards have? Look for what `param_dtype` changes.",
            "4 bytes of parameters, 4 of gradients, 8 of Adam's moments.",
        ],
        solution=f"16 bytes times {num_params / 1e9:g} billion, divided by {num_ranks}: {shard / 1e9:g} GB. Gathered "
        "bf16 layers and activations come on top.",
    )


def bytes_between_nodes(num_params: int, shard_size: int) -> Exercise:
    """Ask for the traffic of hybrid sharding over the network."""
    sent = 2 * num_params / shard_size
    return Exercise(
        f"`hybrid_shard` on two nodes of {shard_size} GPUs: each node holds a full copy, sharded over its GPUs. The "
        f"model has {num_params / 1e9:g} billion parameters. How many elements does a GPU send over the network in one "
        "step? Count an all-reduce of n elements as 2n. Answer in millions.",
        check=number(
            sent / 1e6,
            relative=0.01,
            unit="million",
            near={
                3 * num_params / 1e6: "That is what `full_shard` sends. Which of it stays inside the node?",
                2 * num_params / 1e6: "That is an all-reduce of all gradients. Each GPU has reduced only its shard.",
            },
        ),
        hints=["The gathers and the reduce-scatter stay within a node. What is left?"],
        solution=f"Each GPU ends with the gradients of its shard, 1/{shard_size} of all, and all-reduces them with the "
        f"other node: 2 x {num_params / 1e9:g} billion / {shard_size} = {sent / 1e6:g} million.",
    )


def what_waits() -> Exercise:
    """Ask for the mistake behind a pair of stacks."""
    return Exercise(
        "A job of two ranks hangs. `py-spy dump` shows rank 0 in `get_model_state_dict`, called by "
        '`save_weights`, and rank 1 in `forward`, in an all-gather. What is wrong? Answer "a", "b" or "c".\n\n'
        "a: The network between the two is down.\n\n"
        "b: Only rank 0 calls `save_weights`.\n\n"
        "c: Rank 1 is out of memory.",
        check=choice(
            "b",
            near={
                "a": "Then both would wait in the same call. These two are in different collectives.",
                "c": "A rank that is out of memory ends with an error, and torchrun ends the others.",
            },
        ),
        hints=["Two ranks that wait in the same collective wait for data. Where are these two?"],
        solution="b. A full state dict is gathered from all ranks, so all of them must call `get_model_state_dict`; "
        "only the writing belongs under `if rank == 0`.",
    )
