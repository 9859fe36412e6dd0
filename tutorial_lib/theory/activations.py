"""Activations: the tensors that a transformer keeps between forward and backward, and the peak memory of the loss.

Bytes are counted kernel by kernel: the tensors that autograd keeps in today's Hugging Face and torchtitan models.
Notation: h hidden, k width of all keys, f width of the MLP, V vocabulary, s sequence length, t tensor-parallel size,
e bytes per element. A layer keeps, in bytes per token::

    norms               LayerNorm; RMSNorm adds an fp32 copy   2 x (e h); 2 x (e h + 4 h)
    matrix inputs       query-key-value and MLP                2 x (e h)
    attention           query, key, value, output              e (2 h + 2 k)           divided by t
                        without a fused kernel: the scores     heads x s x 6; fp32: 4  divided by t
    MLP                 2 tensors, 4 if gated, 5 in GPT-2      2..5 x (e f)            divided by t

Activation checkpointing (``checkpointing``)::

    none        keeps everything
    selective   the layer's input, the output of a fused attention kernel, and every second matrix product: torchtitan's
                per-operator policy, which this course's engines follow
    full        only the layer's input

Autocast (plain torch and DDP in 16 bits) keeps more: the residual stream stays in fp32, so a layer's two norms keep
2 h more each; each matrix product casts its own input, so two or three products that share an input each keep a
copy (Llama and Qwen: 6 h more); and on a GPU, where ``pow`` runs in fp32, GPT-2's GELU keeps three tensors of width f
in fp32 (6 f more). Other engines compute all of a layer in 16 bits.

While a recomputed layer runs backward, it briefly holds everything that it would otherwise have kept: the *transient*.
By then the logits are gone, so only the larger of transient and logits counts.

The loss (:func:`logits_bytes`) peaks in its backward at three fp32 copies of the logits: the log-probabilities, their
gradient, and the gradient of the logits, together 12 bytes per element. If the logits are split over the
vocabulary, PyTorch's ``loss_parallel`` holds four copies of a rank's share at once.

Assumptions: dropout is off (its masks take one byte per element and layer), nothing is compiled (``torch.compile``
keeps less), and the sequence axis of a DTensor is gathered before each matrix product and stays gathered.

Sources: the kernels themselves (``torch.nn.functional``, transformers 5.23, torch/distributed/tensor/parallel/loss.py),
torchtitan's ``parallelize_llama.py`` of December 2024 (selective policy, sequence parallelism).

Checked: tests/unit/theory/test_activations.py counts the tensors that autograd keeps in this course's three models, and
the bytes that BLOOM's attention moves; docs/planner-errors.md compares peaks of complete runs, ours and published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tutorial_lib.theory.dimensions import Dimensions

CHECKPOINTING = ("none", "selective", "full")
"""Kinds of activation checkpointing, from least to most recomputation."""


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes per token of one layer.

    Args:
        kept: bytes kept until the layer's backward.
        transient: extra bytes while the layer runs backward.
    """

    kept: float
    transient: float


@cache
def layer_activations(
    dimensions: Dimensions,
    checkpointing: str = "none",
    tp: int = 1,
    *,
    sequence_parallel: bool = False,
    bytes_per_element: int = 2,
    seq_length: int = 0,
    autocast: str = "",
) -> LayerActivations:
    """Return the activations that one layer keeps for one token, in bytes.

    Args:
        dimensions: dimensions of the model.
        checkpointing: ``none``, ``selective`` or ``full``.
        tp: t, the tensor-parallel size.
        sequence_parallel: norms and residuals are divided over the tensor-parallel ranks, too.
        bytes_per_element: e, for the type that layers compute in.
        seq_length: s, which only matters without a fused attention kernel.
        autocast: ``cpu`` or ``cuda``, the device where autocast computes in 16 bits on fp32 weights; otherwise empty.

    Raises:
        ValueError: unknown ``checkpointing``.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is {checkpointing!r}. Write one of: {', '.join(CHECKPOINTING)}.")
    h, k, f, e = dimensions.hidden, dimensions.key_value_width, dimensions.mlp_width, bytes_per_element
    own = tp if sequence_parallel else 1
    norm = _norm(dimensions, e)
    scores = 0 if dimensions.fused_attention else dimensions.heads * seq_length * (4 if e == 4 else 6)
    mlp = (dimensions.mlp_tensors or (4 if dimensions.gated else 2)) * e * f
    everything = 2 * norm / own + 2 * e * h + (e * (2 * h + 2 * k) + scores + mlp) / tp
    if autocast:
        everything += 4 * h + 2 * h * max(0, dimensions.column_layers - 2)
        everything += 6 * f if autocast == "cuda" and dimensions.mlp_tensors == 5 else 0
    if checkpointing == "none":
        return LayerActivations(everything, 0.0)
    kept = (4 if autocast else e) * h / own
    if checkpointing == "selective":
        products = h + k + f if dimensions.column_layers > 2 else h + 2 * k + f
        attention = h if dimensions.fused_attention else 0
        kept += e * ((attention + products) / tp + (h if dimensions.column_layers > 2 else 0))
    return LayerActivations(kept, max(0.0, everything - kept))


def score_traffic(
    dimensions: Dimensions, seq_length: int, checkpointing: str = "none", bytes_per_element: int = 2
) -> float:
    """Return the bytes per token that a layer's attention reads and writes if it has no fused kernel; otherwise 0.

    Its matrix of scores passes through the device's memory once per operator: scaling, masking, softmax (in fp32),
    products, and their gradients. In 16 bits this moves 60 bytes per score, 28 of them in forward; in fp32 it moves 52,
    24 of them in forward (counted on BLOOM, without dropout).

    Args:
        dimensions: dimensions of the model.
        seq_length: s, in tokens.
        checkpointing: ``none``, ``selective`` or ``full``; recomputation repeats forward.
        bytes_per_element: 2, or 4 in fp32.
    """
    if dimensions.fused_attention:
        return 0.0
    everything, forward = (60, 28) if bytes_per_element == 2 else (52, 24)
    return dimensions.heads * seq_length * (everything + (forward if checkpointing != "none" else 0))


def last_norm(
    dimensions: Dimensions, bytes_per_element: int = 2, tp: int = 1, *, sequence_parallel: bool = False,
    autocast: str = "",
) -> float:  # fmt: skip
    """Return the bytes per token of the inputs of the last norm and the output layer, which are never recomputed."""
    own = tp if sequence_parallel else 1
    extra = 2 * dimensions.hidden if autocast else 0
    return _norm(dimensions, bytes_per_element) / own + bytes_per_element * dimensions.hidden + extra


def _norm(dimensions: Dimensions, bytes_per_element: int) -> float:
    is_layer_norm = dimensions.norm_vectors == 2
    return (bytes_per_element if is_layer_norm else bytes_per_element + 4) * dimensions.hidden


def recomputed_share(dimensions: Dimensions, checkpointing: str) -> tuple[float, float]:
    """Return the shares of a layer's forward matrix products, and of its attention, that backward recomputes.

    ``selective`` recomputes every second product, in the order query, key, value, output, gate, up, down. It also
    recomputes attention without a fused kernel.
    """
    if checkpointing != "selective":
        return (1.0, 1.0) if checkpointing == "full" else (0.0, 0.0)
    widths = [rows * columns for rows, columns in dimensions.linear_widths]
    if dimensions.column_layers <= 2:
        widths = [sum(widths[:3]), *widths[3:]]  # one fused query-key-value product
    return sum(widths[1::2]) / sum(widths), float(not dimensions.fused_attention)


def logits_bytes(tokens: float, vocabulary: int, *, vocabulary_parallel: int = 1, chunks: int = 1) -> float:
    """Return the peak of the loss in bytes: three fp32 copies of the logits, or four of a rank's share of them.

    Args:
        tokens: tokens of a micro-batch on one rank.
        vocabulary: V, the size of the vocabulary.
        vocabulary_parallel: number of ranks that the logits are split over; 1 means not split.
        chunks: number of pieces in which output layer and loss are computed, one after the other.
    """
    copies = 16 if vocabulary_parallel > 1 else 12
    return copies * tokens / chunks * vocabulary / vocabulary_parallel
