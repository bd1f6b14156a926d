"""Settings of the model architecture."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.constraints import UNSET, flag


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model"""

    num_layers: int = flag(UNSET, "number of transformer layers", required=True, above=0, core="model")
    hidden_size: int = flag(UNSET, "transformer hidden size", required=True, above=0, core="model")
    ffn_hidden_size: int = flag(
        UNSET,
        "MLP hidden size; default 4 x hidden size, or 8/3 x hidden size rounded down to a multiple of 64 if gated",
        above=0,
        core="model",
    )
    num_attention_heads: int = flag(UNSET, "number of attention heads", required=True, above=0, core="model")
    group_query_attention: bool = flag(False, "use grouped-query attention; requires --num-query-groups")
    num_query_groups: int | None = flag(None, "number of key/value heads in grouped-query attention", above=0)
    kv_channels: int = flag(
        UNSET,
        "projection size per attention head; default hidden size / number of attention heads",
        above=0,
        core="model",
    )
    seq_length: int = flag(UNSET, "sequence length of a training sample", required=True, above=0)
    max_position_embeddings: int = flag(UNSET, "number of position embeddings; default the sequence length", above=0)
    position_embedding_type: str = flag(
        "learned_absolute", "position embedding type", choices=("learned_absolute", "rope", "none")
    )
    rotary_base: int = flag(10000, "base of the rotary position embeddings", above=0)
    rotary_percent: float = flag(1.0, "fraction of each head's channels to rotate", above=0, at_most=1)
    rotary_seq_len_interpolation_factor: int | None = flag(
        None, "divide rotary positions by this factor (linear interpolation for longer sequences)", above=0
    )
    use_rope_scaling: bool = flag(False, "scale the frequencies of rotary embeddings as in Llama 3.x")
    rope_scaling_factor: float = flag(8.0, "scaling factor of --use-rope-scaling", at_least=1)
    normalization: str = flag("LayerNorm", "normalization layer", choices=("LayerNorm", "RMSNorm"), core="model")
    norm_epsilon: float = flag(1e-5, "epsilon of the normalization layers", above=0, core="model.layernorm_epsilon")
    apply_layernorm_1p: bool = flag(
        False,
        "store normalization weights as their difference from 1, about which weights in low precision are finer",
        core="model.layernorm_zero_centered_gamma",
    )
    swiglu: bool = flag(False, "use gated linear units and SiLU activation instead of GELU (--activation swiglu)")
    activation: str | None = flag(
        None,
        "MLP activation, identical on every device; default swiglu with --swiglu, else gelu. gelu is the exact "
        "function; Megatron-LM's fused GELU is gelu_tanh, as in GPT-2",
        choices=("gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "squared_relu"),
    )
    disable_bias_linear: bool = flag(False, "disable bias in linear layers")
    add_qkv_bias: bool = flag(False, "add bias to the query/key/value projection only", core="model")
    untie_embeddings_and_output_weights: bool = flag(False, "use separate input embedding and output layer weights")
    qk_layernorm: bool = flag(False, "normalize queries and keys", core="model")
    attention_dropout: float = flag(0.1, "dropout probability of attention weights", at_least=0, below=1, core="model")
    hidden_dropout: float = flag(0.1, "dropout probability of the hidden states", at_least=0, below=1, core="model")
    init_method_std: float = flag(0.02, "standard deviation of the weight initialization", at_least=0, core="model")
    make_vocab_size_divisible_by: int = flag(128, "pad the vocabulary size to a multiple of this x TP", above=0)
    vocab_size: int | None = flag(
        None,
        "vocabulary size before padding; default and minimum: the tokenizer's. Required by NullTokenizer; TikTokenizer "
        "reads this many entries of a .json file, including special tokens",
        above=0,
    )
    attention_softmax_in_fp32: bool = flag(False, "run attention masking and softmax in fp32", core="model")
    slm_logit_softcap: float | None = flag(None, "cap logits to c x tanh(logits / c); default no cap", above=0)
    mtp_num_layers: int | None = flag(
        None,
        "number of multi-token prediction (MTP) layers, each predicting one token further ahead",
        above=0,
        core="model",
    )
    mtp_loss_scaling_factor: float = flag(0.1, "scaling factor of the average MTP loss", at_least=0, core="model")
    num_experts: int | None = flag(
        None,
        "number of experts per layer (mixture of experts); default a dense MLP",
        above=0,
        core="model.num_moe_experts",
    )
    moe_ffn_hidden_size: int = flag(
        UNSET, "hidden size of each expert's MLP; default --ffn-hidden-size", above=0, core="model"
    )
    moe_router_topk: int = flag(2, "number of experts to route each token to", above=0, core="model")
    moe_router_pre_softmax: bool = flag(
        False, "apply the router's softmax before top-k selection, not after", core="model"
    )
    moe_router_load_balancing_type: str = flag(
        "aux_loss", "load-balancing strategy of the router", choices=("aux_loss", "seq_aux_loss", "none"), core="model"
    )
    moe_aux_loss_coeff: float = flag(
        0.0,
        "scaling coefficient of the load-balancing loss, which is computed over all tokens",
        at_least=0,
        core="model",
    )
    moe_z_loss_coeff: float | None = flag(
        None, "scaling coefficient of the router's z-loss, which is computed over all tokens", at_least=0, core="model"
    )
    moe_token_dispatcher_type: str = flag(
        "allgather", "token dispatcher", choices=("allgather", "alltoall"), core="model"
    )
    moe_grouped_gemm: bool = flag(
        False, "run all local experts in one grouped GEMM; requires Transformer Engine", core="model"
    )
    transformer_impl: str | None = flag(
        None,
        "transformer layer implementation; default transformer_engine on a GPU with --bf16 or --fp16, if it is "
        "installed, else local",
        choices=("local", "transformer_engine"),
    )
