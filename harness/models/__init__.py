"""Base models and tokenizers. The only package that imports transformers."""
