"""Settings of the data and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.constraints import UNSET, flag


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data"""

    data_path: list[str] = flag(
        list,
        "corpus prefix, or a blend: weight prefix weight prefix ..., or a YAML or JSON file of prefix: weight entries",
    )
    train_data_path: list[str] = flag(
        list, "prefix or blend of an independent training set, in the format of --data-path"
    )
    valid_data_path: dict[str, list[str]] = flag(
        dict, "named validation sets: NAME=PREFIX ...; each may be a blend (NAME=0.3 P1 0.7 P2) or a blend file"
    )
    data_args_path: str | None = flag(None, "text file with the arguments of --data-path")
    per_split_data_args_path: str | None = flag(None, "JSON file with the blends of the keys train and valid")
    split: str | None = flag(
        None,
        "comma-separated proportions of --data-path for training, validation and test; default 969,30,1, or training "
        "only if --valid-data-path is given",
    )
    mock_data: bool = flag(
        False, "train on generated mock data instead of corpora; as in Megatron-LM, --split has no effect on them"
    )
    data_order: str = flag(
        "megatron",
        "sample order: megatron shuffles all epochs together, so that the order depends on the length of the run; "
        "stable shuffles each epoch independently",
        choices=("megatron", "stable"),
    )
    slm_sentences: str = flag(
        "refuse",
        "handling of documents with several sequences, which preprocess_data.py --split-sentences produces: refuse "
        "them, join the sentences of a document, or shuffle sentences separately, as Megatron-LM does",
        choices=("refuse", "join", "separate"),
    )
    slm_accept_changed_corpora: bool = flag(
        False, "resume even if the content of a corpus has changed since the checkpoint was saved"
    )
    data_cache_path: str | None = flag(None, "directory for cached index files; default next to the corpus")
    reset_position_ids: bool = flag(False, "reset position ids after each end-of-document token")
    reset_attention_mask: bool = flag(False, "reset the attention mask after each end-of-document token")
    eod_mask_loss: bool = flag(False, "mask the loss of end-of-document tokens")
    num_workers: int = flag(2, "number of batches to prefetch; 0 loads each batch on demand", at_least=0)
    slm_loss_mask: str | None = flag(
        None,
        "name of the loss masks CORPUS.NAME.mask of --objective sft; default answers, which tools/preprocess_sft.py "
        "writes",
    )
    full_validation: bool = flag(False, "evaluate on a full epoch of each validation set")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer"""

    tokenizer_type: str = flag(
        UNSET,
        "tokenizer type; default GPT2BPETokenizer if --vocab-file is given",
        required=True,
        choices=(
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "HuggingFaceTokenizer",
            "GPT2BPETokenizer",
            "TikTokenizer",
            "ByteTokenizer",
            "NullTokenizer",
        ),
    )
    tokenizer_model: str | None = flag(None, "path of the tokenizer model, or directory of a HuggingFaceTokenizer")
    vocab_file: str | None = flag(None, "path of the vocabulary file of GPT2BPETokenizer")
    merge_file: str | None = flag(None, "path of the BPE merge file of GPT2BPETokenizer")
    tiktoken_pattern: str = flag("v2", "pre-tokenization pattern of TikTokenizer for .json files", choices=("v1", "v2"))
    tiktoken_num_special_tokens: int = flag(1000, "number of special tokens of TikTokenizer for .json files", above=0)
    eod_id: int | None = flag(
        None, "id of the end-of-document token; default the tokenizer's; required if the tokenizer has none", at_least=0
    )
    null_tokenizer_eod_id: int | None = flag(None, "Megatron-LM's name for the --eod-id of NullTokenizer", at_least=0)
