"""Evaluation of compressed models: perplexity, answers, and bytes."""
