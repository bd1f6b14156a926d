"""Presentation of a corpus: table, length histogram in the terminal or as a plot, and document text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_slm.corpus.index import Index, bin_path, idx_path
from megatron_slm.corpus.inspection import Lengths, document_ids
from megatron_slm.corpus.metadata import read_metadata
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import atomic_path
from megatron_slm.tokenizers.tokenizer import Tokenizer

LONGEST_BAR = 40  # columns


def print_counts(console: Console, index: Index, lengths: Lengths) -> None:
    """Print the counts, the recorded tokenizer, and a histogram of document lengths."""
    table = Table(title=index.prefix, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in counts(index, lengths):
        table.add_row(*row)
    console.print(table)
    if not lengths.total:
        return
    bins = Table("tokens", "documents", "", title="lengths of documents", box=None)
    bins.columns[0].justify = bins.columns[1].justify = "right"
    most = max(count for _, _, count in lengths.doubling_bins())
    for shortest, longest, count in lengths.doubling_bins():
        span = f"{shortest:,}" if shortest >= longest else f"{shortest:,}-{longest:,}"
        bins.add_row(span, f"{count:,}", "█" * (-(-LONGEST_BAR * count // most)))
    console.print(bins)


def counts(index: Index, lengths: Lengths) -> list[tuple[str, str]]:
    """Return the (label, value) rows of a corpus summary."""
    tokens = index.tokens()
    rows = [
        ("documents", f"{index.documents:,}"),
        ("sequences", f"{index.sequences:,}"),
        ("tokens", f"{tokens:,}"),
        ("dtype", str(index.dtype)),
        (".bin, .idx", f"{bin_path(index.prefix).stat().st_size:,} B, {idx_path(index.prefix).stat().st_size:,} B"),
    ]
    metadata = read_metadata(index.prefix)
    if metadata is None:
        rows.append(("tokenizer", "not recorded"))
    else:
        recorded = metadata["tokenizer"]
        end = f"end of document {recorded['eod']}, " if "eod" in recorded else ""
        size = f"{recorded['vocab_size']:,} entries"
        rows.append(("tokenizer", f"{recorded['name']}, {size}, {end}{recorded['fingerprint']}"))
        rows += [(str(key), str(value)) for key, value in metadata.items() if key not in ("tokenizer", *dict(rows))]
    if lengths.total:
        shares = " ".join(f"{lengths.quantile(share):,}" for share in (0, 0.1, 0.5, 0.9, 0.99, 1))
        rows += [("tokens per document", f"mean {lengths.mean:,.1f}"), ("min 10% 50% 90% 99% max", shares)]
    return rows


def print_document(console: Console, index: Index, number: int, tokenizer: Tokenizer | None, max_tokens: int) -> None:
    """Print the text of a document, or its ids if there is no tokenizer.

    Args:
        max_tokens: maximum number of tokens to print; 0 prints all.
    """
    ids = document_ids(index, number)
    shown = ids[:max_tokens] if max_tokens else ids
    more = f", the first {len(shown):,} shown" if len(shown) < len(ids) else ""
    console.print(f"── document {number}: {len(ids):,} tokens{more} ──", style="bold")
    if tokenizer is None:
        console.print(" ".join(map(str, shown.tolist())), markup=False)
        return
    if len(shown) and int(shown.max()) >= tokenizer.vocab_size:
        raise ConfigError(
            f"--documents {number}: the document contains the id {int(shown.max())}, but the vocabulary of "
            f"{tokenizer.name} has {tokenizer.vocab_size:,} entries. Use the tokenizer that made the corpus "
            "(--tokenizer-model)."
        )
    console.print(tokenizer.decode(shown.tolist()), markup=False)


def plot_lengths(lengths: Lengths, title: str, path: Path) -> None:
    """Plot a log-scale histogram of document lengths, weighted by documents and by tokens.

    Raises:
        ConfigError: ``path`` cannot be written, or its suffix is not an image format.
    """
    import matplotlib.pyplot as plt

    longest = max(int(lengths.tokens[-1]) if lengths.total else 1, 2)
    edges = np.unique(np.geomspace(1, longest + 1, 61).round()).tolist()
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    for weights, label, color in (
        (lengths.documents, "documents", "#0072B2"),
        (lengths.documents * lengths.tokens, "tokens in them", "#D55E00"),
    ):
        share = weights / max(weights.sum(), 1)
        panel.hist(lengths.tokens, edges, weights=share, histtype="step", linewidth=1.6, label=label, color=color)
    panel.set_xscale("log")
    panel.set(xlabel="tokens in a document", ylabel="share", title=title)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    try:
        with atomic_path(path, "--plot") as temporary:
            figure.savefig(temporary, dpi=130)
    except ValueError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)
