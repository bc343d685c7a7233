"""Files: written whole or not at all; PNG records, prompts, safetensors."""
