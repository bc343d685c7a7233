"""Data-free self-distillation: a converted checkpoint becomes a 1.58-bit one, from prompts and noise alone."""
