"""What a compressed model is worth: perplexity, answers, and bytes."""
