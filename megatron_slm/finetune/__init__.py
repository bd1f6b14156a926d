"""Supervised fine-tuning data: examples with answers, chat templates, and selection over a corpus."""
