"""From a name, a folder or a GGUF file to a transformers model and its tokenizer."""
