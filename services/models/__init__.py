"""A model's files, its tokenizer, and prompts compiled with it."""
