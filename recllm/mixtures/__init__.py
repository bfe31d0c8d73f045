"""What a model is trained on: alignment and reasoning data as prompts and completions, and the order they come in."""
