"""Models in Hugging Face's directory format: config.json, safetensors and tokenizer files."""
