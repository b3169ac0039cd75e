"""Between messages and tokens: templates, tokenizers, output parsing, grammars, chunk streams."""
