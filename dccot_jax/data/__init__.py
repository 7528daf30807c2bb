"""Text to token ids to training batches: tokenizer, chat template, student files, token rows, the packed-row loader."""
